// Creating elements of the page. Texts are set as text, so nothing from a file or a model is read as HTML.

export const find = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") created.setAttribute(name, value);
    else created[name] = value;
  }
  created.append(...children);
  return created;
}

export function button(label, onclick) {
  return element("button", { type: "button", onclick }, label);
}

export function showProblem(message) {
  find("problem").textContent = message;
  find("problem").hidden = !message;
}

export function showStatus(message) {
  find("status").textContent = message;
}
