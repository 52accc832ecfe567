// Elements whose texts are set as texts: nothing that comes from a run is ever parsed as HTML.

function byId(id) {
  return document.getElementById(id);
}

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name.startsWith("aria-") || name === "role" || name === "scope" || name === "for")
      made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A name from a run, shown as it is and kept apart from the writing direction of what surrounds it.
function nameOf(text) {
  return element("bdi", { text });
}

function pairsList(pairs) {
  const rows = pairs.flatMap(([label, text]) => [element("dt", {}, nameOf(label)), element("dd", {}, nameOf(text))]);
  return element("dl", {}, ...rows);
}

function folded(title, content) {
  return element("details", {}, element("summary", { text: title }), content);
}

function fillSelect(select, entries, chosen) {
  select.replaceChildren(
    ...entries.map(([value, text]) => element("option", { value, text, selected: value === chosen })),
  );
  select.value = chosen;
}

// A long name without its middle; the end tells more than what lies before it.
function shorten(text, length) {
  if (text.length <= length) return text;
  const tail = Math.ceil((2 * length) / 3);
  return `${text.slice(0, length - tail - 1)}…${text.slice(-tail)}`;
}

function plural(count, word) {
  return `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;
}
