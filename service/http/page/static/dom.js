// Builds elements and brings what is shown up to date with them. Text is always text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "rect", "path", "title", "line"]);

// h("a.name", { href: "#" }, "text", child, [more]): attributes that are false, null or undefined are left out.
export function h(selector, attributes, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false || child === "") continue;
    if (Array.isArray(child)) append(node, child);
    else node.append(child instanceof Node ? child : String(child));
  }
}

// Makes the children of `target` equal to `wanted` and keeps those that are alike, with their focus and what is open.
export function show(target, ...wanted) {
  const list = document.createElement("div");
  append(list, wanted);
  children(target, list);
}

function key(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null;
}

function alike(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && key(one) === key(other);
}

function children(target, wanted) {
  const keyed = new Map();
  for (const child of target.childNodes) if (key(child)) keyed.set(key(child), child);
  let at = target.firstChild;
  for (const node of [...wanted.childNodes]) {
    const known = key(node) ? keyed.get(key(node)) : null;
    if (known && known !== at) target.insertBefore(known, at);
    const old = known ?? at;
    if (old && alike(old, node)) {
      update(old, node);
      at = old.nextSibling;
    } else {
      target.insertBefore(node, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function update(old, node) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // What a person has opened stays open.
    if (!node.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of node.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  children(old, node);
}
