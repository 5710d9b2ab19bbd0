// The demo page: asks the interface of the service it came from, and shows exactly what it answers.
// Whatever comes from data goes into the page as text (textContent), never as markup.

import { $, call, make, Refused, showError } from "./asking.js";
import { combobox } from "./combobox.js";
import { addFilter, readFilter, setFilters, typed } from "./filters.js";

const BASIS = {
  personal: "from what this user did", history: "from the items chosen", features: "from features",
  popular: "most popular, as nothing is known to go by", similar: "nearest to it",
};

let facts = { attributes: {}, item_fields: [] };
let chosen = [];
let asked = 0;

// ---- The question ----

const who = () => new FormData($("question")).get("who");

function chooseUser(id) {
  $("user").value = id;
  ask();
}

function chooseItem(item) {
  $("item").value = "";
  if (!chosen.some((each) => each.item_id === item.item_id)) chosen.push(item);
  renderChosen();
  ask();
}

function renderChosen() {
  $("chosen").replaceChildren(...chosen.map((item) => {
    const name = item.title ?? item.item_id;
    const remove = make("button", { type: "button", "aria-label": `Remove ${name}` }, "×");
    remove.onclick = () => {
      chosen = chosen.filter((each) => each !== item);
      renderChosen();
      $("item").focus();
      ask();
    };
    return make("li", {}, make("span", {}, name), remove);
  }));
}

async function findItems(query, limit, signal) {
  const found = await call(`demo/items?${new URLSearchParams({ query, limit })}`, null, signal);
  return found.content.items;
}

// Enter takes the first item found for what was typed.
async function takeFirst(event) {
  if (event.key !== "Enter" || event.defaultPrevented) return;
  event.preventDefault();
  const query = $("item").value.trim();
  if (!query) return ask(true);
  try {
    const [first] = await findItems(query, 1);
    if (!first) throw new Refused({ message: `No item has ${query} in its title or as its id.` });
    closeItemOptions();
    chooseItem(first);
  } catch (error) {
    showError($("error"), error);
  }
}

const closeUserOptions = combobox(
  $("user"), $("user-options"),
  async (prefix, signal) => {
    const found = await call(`demo/users?${new URLSearchParams({ prefix, limit: 8 })}`, null, signal);
    return found.content.users.map((id) => ({ value: id, label: id }));
  },
  (option) => chooseUser(option.value),
);
const closeItemOptions = combobox(
  $("item"), $("item-options"),
  async (query, signal) => {
    const items = query ? await findItems(query, 8, signal) : [];
    return items.map((item) => ({ value: item, label: item.title ?? item.item_id, detail: item.item_id }));
  },
  (option) => chooseItem(option.value),
);
$("item").addEventListener("keydown", takeFirst);

// The columns of items that are shown; an attribute made from a column of another name is none.
const shownFields = () => [...new Set(["title", ...Object.keys(facts.attributes)])]
  .filter((name) => facts.item_fields.includes(name));

function readQuestion() {
  const k = $("k").value.trim();
  const question = { k: typed(k, "integer"), exclude_seen: $("exclude-seen").checked, fields: shownFields() };
  const filter = readFilter();
  if (Object.keys(filter).length) question.filter = filter;
  if (who() === "user") question.user_id = $("user").value.trim();
  else question.history = chosen.map((item) => item.item_id);
  return question;
}

// ---- The answer ----

const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;

function itemEntries(items, open) {
  const scores = items.map((item) => item.score);
  const lowest = Math.min(0, ...scores), span = Math.max(...scores, 0) - lowest || 1;
  return items.map((item, i) => {
    const name = item.title ?? item.item_id;
    const title = make("button", { type: "button", className: "title", title: "Show similar items" }, name);
    title.onclick = () => open(item);
    const bar = make("span", { className: "bar", "aria-hidden": "true" });
    bar.style.width = `${((item.score - lowest) / span) * 100}%`;
    const about = [item.item_id, ...describe(item)].join(" · ");
    return make("li", {},
      make("span", { className: "rank" }, String(i + 1)),
      make("div", { className: "what" }, title, make("p", { className: "quiet about" }, about)),
      make("div", { className: "how" }, make("span", { className: "score" }, item.score.toFixed(4)), bar));
  });
}

// The attributes of an item that it has; those whose value does not speak for itself with their names.
function describe(item) {
  return Object.entries(facts.attributes)
    .filter(([name]) => ![undefined, null, ""].includes(item[name]) && name !== "title")
    .map(([name, { type }]) => {
      if (type === "list") return String(item[name]).split("|").join(", ");
      return type === "text" ? String(item[name]) : `${name} ${item[name]}`;
    });
}

function counted(items, basis) {
  return `${items.length} ${items.length === 1 ? "item" : "items"}, ${basis}`;
}

function showAnswer({ content, ms }) {
  const { items, strategy, generation, partial, missing_groups: missing, timing_ms: took } = content;
  $("status").textContent = `${counted(items, BASIS[strategy] ?? strategy)}.`;
  $("partial").hidden = !partial;
  $("partial").textContent = `A part of the index did not answer (${missing.join(", ")}): better items may be missing.`;
  const shown = {
    generation, strategy, partial: partial ? "yes" : "no", encode: milliseconds(took.encode),
    search: milliseconds(took.search), total: milliseconds(took.total), "round trip": milliseconds(ms),
  };
  $("timing").replaceChildren(...Object.entries(shown).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", { "data-fact": name }, value))));
  $("timing").hidden = false;
  $("items").replaceChildren(...itemEntries(items, showSimilar));
}

function clearAnswer(status) {
  $("status").textContent = status;
  $("timing").hidden = $("partial").hidden = true;
  $("items").replaceChildren();
}

// Asks and shows; without a user or items this says so only where `plainly` asked.
async function ask(plainly = false) {
  const turn = ++asked;
  closeUserOptions();
  $("error").hidden = true;
  const empty = who() === "user" ? !$("user").value.trim() : !chosen.length;
  if (empty) {
    clearAnswer(who() === "user" ? "Pick a user." : "Pick a few items.");
    $("history").hidden = true;
    $("results").removeAttribute("aria-busy");
    if (plainly) $(who() === "user" ? "user" : "item").focus();
    return;
  }
  $("results").setAttribute("aria-busy", "true");
  const past = who() === "user" ? showHistory($("user").value.trim(), turn) : ($("history").hidden = true, null);
  try {
    const answer = await current(() => call("v1/retrieve", readQuestion()));
    if (turn === asked) showAnswer(answer);
  } catch (error) {
    if (turn !== asked) return;
    clearAnswer("No answer.");
    showError($("error"), error);
  }
  await past;
  if (turn === asked) $("results").removeAttribute("aria-busy");
}

async function showHistory(userId, turn) {
  let note, entries = [];
  try {
    const { content } = await call(`demo/users/${encodeURIComponent(userId)}/history`);
    const { items, num_seen: seen } = content;
    note = `The latest ${items.length} that the model looks at; ${seen} different items seen in all.`;
    const dates = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short", timeZone: "UTC" });
    entries = items.map((item) => {
      const title = make("button", { type: "button", className: "title", title: "Show similar items" }, item.title ?? item.item_id);
      title.onclick = () => showSimilar(item);
      const when = item.time === null ? [] : [make("time", { dateTime: item.time, className: "quiet" }, dates.format(new Date(item.time)))];
      return make("li", {}, title, ...when);
    });
  } catch (error) {
    note = `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
  }
  if (turn !== asked) return;
  $("history-note").textContent = note;
  $("history-items").replaceChildren(...entries);
  $("history").hidden = false;
}

let compared = 0;

async function showSimilar(item) {
  const turn = ++compared;
  $("similar-title").textContent = `Similar to ${item.title ?? item.item_id}`;
  $("similar-error").hidden = true;
  $("similar-status").textContent = "Looking";
  $("similar-items").replaceChildren();
  if (!$("similar").open) $("similar").showModal();
  try {
    const { content, ms } = await current(() => {
      const query = new URLSearchParams({ k: 10, fields: shownFields().join(",") });
      return call(`v1/items/${encodeURIComponent(item.item_id)}/similar?${query}`);
    });
    if (turn !== compared) return;
    $("similar-status").textContent = `${counted(content.items, BASIS.similar)}; ${milliseconds(ms)} round trip, generation ${content.generation}.`;
    $("similar-items").replaceChildren(...itemEntries(content.items, showSimilar));
    $("similar").scrollTop = 0;
  } catch (error) {
    if (turn !== compared) return;
    $("similar-status").textContent = "";
    showError($("similar-error"), error);
  }
}

// ---- The generation ----

// Takes what is known of the generation that answers, if it is another one than before.
async function learn() {
  const { content } = await call("v1/generation");
  if (content.id === facts.id) return;
  const { values } = (await call("demo/values")).content;
  facts = content;
  const number = new Intl.NumberFormat("en");
  $("generation").textContent = `generation ${facts.id} · ${number.format(facts.num_items)} items · `
    + `${number.format(facts.num_users)} users · index recall ${facts.index.index_recall.toFixed(3)}`;
  setFilters(facts.attributes, values, () => ask());
}

// Asks, and once more where another generation has taken its place since: it may have other columns and attributes.
async function current(question) {
  const { id } = facts;
  try {
    const answer = await question();
    if (answer.content.generation === id) return answer;
    await learn();
    if (facts.id === id) return answer;
  } catch (error) {
    // Another question may have found out meanwhile.
    await learn();
    if (facts.id === id) throw error;
  }
  return question();
}

// ---- Start ----

function showWho() {
  $("by-user").hidden = who() !== "user";
  $("by-items").hidden = who() !== "items";
  ask();
}

$("question").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(true);
});
document.getElementsByName("who").forEach((each) => each.addEventListener("change", showWho));
$("k").addEventListener("change", () => ask());
$("exclude-seen").addEventListener("change", () => ask());
$("add-filter").addEventListener("click", addFilter);
$("close-similar").addEventListener("click", () => $("similar").close());
$("similar").addEventListener("click", (event) => { if (event.target === $("similar")) $("similar").close(); });

async function start() {
  try {
    const [users] = await Promise.all([call("demo/users?limit=4"), learn()]);
    const examples = users.content.users;
    const buttons = examples.map((id) => {
      const button = make("button", { type: "button", className: "link" }, id);
      button.onclick = () => chooseUser(id);
      return button;
    });
    $("examples").replaceChildren("For example ", ...buttons);
    $("examples").hidden = !buttons.length;
    if (examples.length && !$("user").value && who() === "user") chooseUser(examples[0]);
    else showWho();
  } catch (error) {
    $("generation").textContent = "No generation answers";
    showError($("error"), error);
  }
}

start();
