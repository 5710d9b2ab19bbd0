// Suggestions below an input, by mouse and by keyboard.

import { $, make, showError } from "./asking.js";

const TYPING_PAUSE_MS = 120;

// `search` returns options {value, label, detail}; `choose` takes one. Returns what closes the list.
export function combobox(input, list, search, choose) {
  let options = [], active = -1, timer = 0, running = null;
  const attributes = {
    role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": list.id,
  };
  Object.entries(attributes).forEach(([name, value]) => input.setAttribute(name, value));
  list.setAttribute("role", "listbox");

  function close() {
    clearTimeout(timer);
    running?.abort();
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }
  function move(to) {
    active = (to + options.length) % options.length;
    [...list.children].forEach((each, i) => each.setAttribute("aria-selected", String(i === active)));
    list.children[active].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", list.children[active].id);
  }
  function pick(option) {
    close();
    choose(option);
  }
  async function update() {
    running?.abort();
    running = new AbortController();
    const { signal } = running;
    try {
      const found = await search(input.value.trim(), signal);
      if (signal.aborted) return;
      options = found;
    } catch (error) {
      if (error.name === "AbortError") return;
      options = [];
      showError($("error"), error);
    }
    active = -1;
    const entries = options.map((option, i) => {
      const entry = make("li", { role: "option", id: `${list.id}-${i}`, "aria-selected": "false" }, option.label);
      if (option.detail) entry.append(make("span", { className: "quiet" }, option.detail));
      // The input keeps the focus, without which the list would close before the click. A finger that scrolls
      // the list makes no click.
      entry.onmousedown = (event) => event.preventDefault();
      entry.onclick = () => pick(option);
      return entry;
    });
    list.replaceChildren(...entries);
    list.hidden = options.length === 0;
    input.setAttribute("aria-expanded", String(!list.hidden));
    input.removeAttribute("aria-activedescendant");
  }
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(update, TYPING_PAUSE_MS);
  });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", async (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) await update();
      if (options.length && !list.hidden) move(event.key === "ArrowDown" ? active + 1 : Math.max(active, 0) - 1);
    } else if (event.key === "Escape" && !list.hidden) {
      event.preventDefault();
      close();
    } else if (event.key === "Enter" && active >= 0) {
      event.preventDefault();
      pick(options[active]);
    }
  });
  return close;
}
