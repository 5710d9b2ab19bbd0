"use strict";
// Values at the pointer, and with the arrow keys: each chart is one stop of the keyboard.
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const marks = [...svg.querySelectorAll("[data-tip]")];
  if (!marks.length) continue;
  const near = plot.dataset.near;
  for (const mark of marks) mark.querySelector("title")?.remove();
  if (marks[0].dataset.place) marks.sort((a, b) => a.dataset.place - b.dataset.place);
  const box = document.createElement("div");
  box.className = "tip";
  box.hidden = true;
  box.setAttribute("role", "status");
  plot.append(box);
  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `${plot.closest("figure").querySelector("h3").textContent}: values, by the arrow keys`);
  let places = null;
  let shown = -1;

  function middles() {
    places ??= marks.map((mark) => {
      if (mark.hasAttribute("x")) return [Number(mark.getAttribute("x")), Number(mark.getAttribute("y"))];
      const { x, y, width, height } = mark.getBBox();
      return [x + width / 2, y + height / 2];
    });
    return places;
  }

  function show(number) {
    if (shown >= 0) marks[shown].classList.remove("on");
    shown = number;
    box.hidden = number < 0;
    if (number < 0) return;
    const mark = marks[number];
    mark.classList.add("on");
    // Text only: names and titles are other people's.
    box.replaceChildren(...mark.dataset.tip.split("\n").map((row, place) => {
      const [series, name, value] = row.split("\t");
      const line = document.createElement("p");
      if (series !== "") {
        const dot = document.createElement("i");
        dot.className = `s${series}`;
        line.append(dot);
      }
      const label = document.createElement(place ? "span" : "b");
      label.textContent = name;
      line.append(label);
      if (value) {
        const number = document.createElement(place ? "b" : "span");
        number.textContent = value;
        line.append(number);
      }
      return line;
    }));
    const whole = svg.viewBox.baseVal;
    const frame = svg.getBoundingClientRect();
    const [x, y] = middles()[number];
    const left = (x / whole.width) * frame.width;
    const top = (y / whole.height) * frame.height;
    const room = plot.clientWidth - box.offsetWidth;
    const beside = left + 14 > room ? left - 14 - box.offsetWidth : left + 14;
    box.style.left = `${Math.min(Math.max(beside, 0), Math.max(room, 0))}px`;
    // Below a chart of lines, which it would cover; else beside the mark.
    box.style.top = `${near === "x" ? frame.height + 2 : Math.min(top + 12, Math.max(frame.height - box.offsetHeight, 0))}px`;
  }

  function closest(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = -1;
    let least = near === "xy" ? 24 ** 2 : Infinity;
    middles().forEach(([x, y], number) => {
      const away = (near === "y" ? 0 : (x - at.x) ** 2) + (near === "x" ? 0 : (y - at.y) ** 2);
      if (away < least) [best, least] = [number, away];
    });
    return best;
  }

  for (const kind of ["pointermove", "pointerdown"]) {
    svg.addEventListener(kind, (event) => {
      const found = closest(event);
      if (found !== shown) show(found);
    });
  }
  // A finger that is lifted leaves; what it pointed at stays until it points elsewhere.
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") show(-1); });
  plot.addEventListener("blur", () => show(-1));
  plot.addEventListener("focus", () => { if (shown < 0 && plot.matches(":focus-visible")) show(0); });
  plot.addEventListener("keydown", (event) => {
    const last = marks.length - 1;
    const next = {
      ArrowRight: shown + 1, ArrowDown: shown + 1, ArrowLeft: shown - 1, ArrowUp: shown - 1,
      Home: 0, End: last, Escape: -1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(event.key === "Escape" ? -1 : Math.min(Math.max(next, 0), last));
  });
}

// Entries of the map's legend bring their group out.
for (const figure of document.querySelectorAll(".chart.map")) {
  const buttons = [...figure.querySelectorAll(".keys li")].map((entry) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...entry.childNodes);
    button.setAttribute("aria-pressed", "false");
    button.dataset.series = entry.dataset.series;
    entry.append(button);
    return button;
  });
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const chosen = button.getAttribute("aria-pressed") !== "true";
      for (const other of buttons) other.setAttribute("aria-pressed", String(chosen && other === button));
      figure.classList.toggle("picking", chosen);
      for (const group of figure.querySelectorAll("g.group")) {
        group.classList.toggle("picked", chosen && group.classList.contains(`s${button.dataset.series}`));
      }
    });
  }
}
