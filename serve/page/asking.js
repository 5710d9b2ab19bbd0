// Asking the service, and showing what it refuses.
// Whatever comes from data goes into the page as text (textContent), never as markup.

const TOKEN = "twotower-token";

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// An error to be shown: what was wrong, what is allowed, and an entry for each thing wrong.
export class Refused extends Error {
  constructor({ message, allowed = "", details = [] }) {
    super(message);
    Object.assign(this, { allowed, details });
  }
}

let signingIn = null;

// Asks for a token once, however many requests wait for it.
function signIn(refused) {
  signingIn ??= new Promise((done, fail) => {
    const dialog = $("access");
    if (refused) $("access-note").textContent = "That token was not accepted.";
    $("token").value = "";
    $("access-form").onsubmit = (event) => {
      event.preventDefault();
      const token = $("token").value.trim();
      // What no header can hold would make every question fail, and nobody would be asked again.
      if (!/^[\x21-\x7e]+$/.test(token)) {
        $("access-note").textContent = "A token has ASCII characters only, without blanks.";
        return;
      }
      sessionStorage.setItem(TOKEN, token);
      signingIn = dialog.onclose = null;
      dialog.close();
      done();
    };
    dialog.onclose = () => {
      signingIn = null;
      fail(new Refused({ message: "The service asks for a token.", allowed: "reload the page to give one" }));
    };
    dialog.showModal();
  });
  return signingIn;
}

// Returns the JSON of an answer, and the milliseconds that it took as this browser saw it.
export async function call(path, body, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...(body && { "content-type": "application/json" }) };
  if (token) headers.authorization = `Bearer ${token}`;
  const began = performance.now();
  let answer, text;
  try {
    const method = body ? "POST" : "GET";
    answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ message: "The service can not be reached.", allowed: "try again in a moment" });
  }
  const ms = performance.now() - began;
  if (answer.status === 401) {
    // Another request may have brought a token meanwhile.
    if (sessionStorage.getItem(TOKEN) === token) await signIn(Boolean(token));
    return call(path, body, signal);
  }
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Refused({ message: `The service answered ${answer.status} without JSON.` });
  }
  if (!answer.ok) throw new Refused(content.error ?? { message: `The service answered ${answer.status}.` });
  return { content, ms };
}

export function showError(box, error) {
  const parts = [make("p", {}, make("strong", {}, error.message))];
  if (error.allowed) parts.push(make("p", {}, `Allowed: ${error.allowed}`));
  if (error.details?.length > 1) {
    const entries = error.details.map((d) => make("li", {}, `${d.where}: ${d.message}. Allowed: ${d.allowed}`));
    parts.push(make("ul", {}, ...entries));
  }
  box.replaceChildren(...parts);
  box.hidden = false;
}
