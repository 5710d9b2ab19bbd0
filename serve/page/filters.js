// Filters, built from the attributes and operators that the generation lists.

import { $, make, Refused } from "./asking.js";

const OPERATORS = {
  any_of: "any of", all_of: "all of", none_of: "none of",
  gte: "at least", gt: "more than", lte: "at most", lt: "less than",
};
const MOST_CHIPS = 12;

let attributes = {};
let frequent = {};
let changed = () => {};
let filters = [];

// Takes attributes by name {type, operators}, frequent values by name, and what to call after a change.
// Filters on what there no longer is go.
export function setFilters(known, values, onChange) {
  [attributes, frequent, changed] = [known, values, onChange];
  $("filters").hidden = !Object.keys(attributes).length;
  const stays = ({ attribute, operator }) => attributes[attribute]?.operators.includes(operator);
  filters.filter((each) => !stays(each)).forEach((each) => each.element.remove());
  filters = filters.filter(stays);
  filters.forEach(renderFilter);
}

function select(label, pairs, value) {
  const options = pairs.map(([key, text]) => make("option", { value: key, selected: key === value }, text));
  return make("select", { "aria-label": label }, ...options);
}

// A value as the attribute's type has it; what is none goes as text, and the service says what is allowed.
export function typed(text, kind) {
  if (kind === "integer" && /^-?\d{1,15}$/.test(text)) return Number(text);
  if (kind === "number" && text && Number.isFinite(Number(text))) return Number(text);
  if (kind === "boolean" && (text === "true" || text === "false")) return text === "true";
  return text;
}

export function addFilter() {
  const attribute = Object.keys(attributes)[0];
  const filter = { attribute, operator: attributes[attribute].operators[0], values: [], bound: "" };
  filter.element = make("div", { className: "filter", role: "group" });
  filters.push(filter);
  $("filter-rows").append(filter.element);
  renderFilter(filter);
  filter.element.querySelector("select").focus();
}

function renderFilter(filter) {
  const { type, operators } = attributes[filter.attribute];
  const names = Object.keys(attributes).map((name) => [name, name]);
  const attribute = select("Attribute", names, filter.attribute);
  attribute.onchange = () => {
    const first = attributes[attribute.value].operators[0];
    Object.assign(filter, { attribute: attribute.value, operator: first, values: [], bound: "" });
    renderFilter(filter);
    filter.element.querySelector("select").focus();
  };
  const operator = select("Condition", operators.map((name) => [name, OPERATORS[name] ?? name]), filter.operator);
  operator.onchange = () => {
    filter.operator = operator.value;
    renderFilter(filter);
    filter.element.querySelectorAll("select")[1].focus();
  };
  const remove = make("button", { type: "button", "aria-label": `Remove the filter on ${filter.attribute}` }, "×");
  remove.onclick = () => {
    filters = filters.filter((each) => each !== filter);
    filter.element.remove();
    $("add-filter").focus();
    changed();
  };
  const parts = filter.operator.endsWith("_of") ? valueList(filter, type) : [bound(filter, type)];
  filter.element.setAttribute("aria-label", `Filter on ${filter.attribute}`);
  filter.element.replaceChildren(attribute, operator, remove, ...parts);
}

function bound(filter, type) {
  const input = make("input", { type: type === "time" ? "date" : "text", value: filter.bound, "aria-label": "Bound" });
  if (type !== "time") input.inputMode = "decimal";
  input.oninput = () => { filter.bound = input.value.trim(); };
  input.onchange = changed;
  return input;
}

// Frequent values as buttons to press, and an input for others.
function valueList(filter, type) {
  const known = (frequent[filter.attribute] ?? []).map(String);
  const shown = [...new Set([...known.slice(0, MOST_CHIPS), ...filter.values])];
  const chips = shown.map((value) => {
    const chip = make("button", { type: "button", className: "chip" }, value);
    chip.setAttribute("aria-pressed", String(filter.values.includes(value)));
    chip.onclick = () => {
      const on = !filter.values.includes(value);
      filter.values = on ? [...filter.values, value] : filter.values.filter((each) => each !== value);
      chip.setAttribute("aria-pressed", String(on));
      changed();
    };
    return chip;
  });
  const list = make("div", { className: "chips", role: "group", "aria-label": "Values" }, ...chips);
  if (known.length && (type === "boolean" || known.length <= MOST_CHIPS)) return [list];
  const input = make("input", { type: "text", "aria-label": "Another value", placeholder: "Another value" });
  const add = () => {
    const value = input.value.trim();
    if (!value) return;
    // It is about to leave the page, which would be another change of it.
    input.value = "";
    if (!filter.values.includes(value)) filter.values.push(value);
    renderFilter(filter);
    changed();
  };
  input.onchange = add;
  input.onkeydown = (event) => {
    if (event.key !== "Enter" || !input.value.trim()) return;
    event.preventDefault();
    add();
    filter.element.querySelector('input[type="text"]').focus();
  };
  return [list, input];
}

export function readFilter() {
  const filter = {};
  for (const { attribute, operator, values: wanted, bound: limit } of filters) {
    const { type } = attributes[attribute];
    const set = operator.endsWith("_of");
    if (set ? !wanted.length : !limit) continue;
    filter[attribute] ??= {};
    if (operator in filter[attribute]) {
      const name = `${attribute} ${OPERATORS[operator] ?? operator}`;
      throw new Refused({ message: `Two filters say “${name}”.`, allowed: "one of each kind" });
    }
    filter[attribute][operator] = set ? wanted.map((value) => typed(value, type)) : typed(limit, type);
  }
  return filter;
}
