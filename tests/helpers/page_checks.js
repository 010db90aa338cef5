// What tests/helpers/browser.py asks of a page.
function accessibilityFaults() {
  const byId = (ids) => (ids || "").split(" ").filter(Boolean).map((id) => document.getElementById(id)?.textContent || "");
  const name = (e) =>
    (e.getAttribute("aria-label") || byId(e.getAttribute("aria-labelledby")).join("") || e.textContent ||
      Array.from(e.labels || []).map((label) => label.textContent).join("")).trim();
  const wanted =
    "button, a[href], input, select, textarea, summary, video, fieldset, " +
    "[role=slider], [role=region], [role=group], [role=img]";
  const found = Array.from(document.querySelectorAll(wanted)).filter((e) => !name(e)).map((e) => e.outerHTML.slice(0, 80));
  document.querySelectorAll("img").forEach((i) => {
    if (!i.alt.trim()) found.push(i.outerHTML.slice(0, 80));
  });
  document.querySelectorAll("[aria-labelledby], [aria-describedby]").forEach((e) => {
    for (const kind of ["aria-labelledby", "aria-describedby"])
      for (const id of (e.getAttribute(kind) || "").split(" ").filter(Boolean))
        if (!document.getElementById(id)) found.push(`${kind} ${id}`);
  });
  const ids = Array.from(document.querySelectorAll("[id]")).map((e) => e.id);
  ids.forEach((id, at) => {
    if (ids.indexOf(id) !== at) found.push(`id ${id} twice`);
  });
  let level = 0;
  document.querySelectorAll("h1, h2, h3, h4, h5").forEach((heading) => {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) found.push(`${heading.tagName} after H${level}: ${heading.textContent}`);
    level = own;
  });
  for (const one of ["main", "h1", "title"])
    if (document.querySelectorAll(one).length !== 1) found.push(`not one ${one}`);
  if (!document.documentElement.lang) found.push("no language");
  return found;
}

function lowContrasts() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.data.trim();
    const e = walk.currentNode.parentElement;
    // What lies on a picture has a plate of its own.
    if (!text || !e.checkVisibility() || e.closest("script, [disabled], .tag, .grip")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(rgba(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  return found;
}
