// SPDX-License-Identifier: Apache-2.0
// The page is whole without this: it filters, folds, and unfolds for the printer.
(() => {
  "use strict";
  const requirements = [...document.querySelectorAll("details.req")];
  const filter = document.getElementById("filter");
  if (filter) {
    filter.hidden = false;
    const find = document.getElementById("find");
    const boxes = [...filter.querySelectorAll("input[type=checkbox]")];
    const found = document.getElementById("found");
    const apply = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
      let count = 0;
      for (const each of requirements) {
        const fits = shown.has(each.dataset.verdict)
          && words.every((word) => each.dataset.words.includes(word));
        each.hidden = !fits;
        count += fits;
      }
      found.textContent = `${count} of ${requirements.length} shown`;
    };
    filter.addEventListener("input", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    const fold = (open) => requirements.forEach((each) => { if (!each.hidden) each.open = open; });
    document.getElementById("open").addEventListener("click", () => fold(true));
    document.getElementById("close").addEventListener("click", () => fold(false));
    document.addEventListener("keydown", (event) => {
      const typing = event.target.matches("input, textarea");
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        find.focus();
      }
    });
  }
  // A link into something folded or filtered away leads there all the same.
  const reveal = () => {
    let name = "";
    try { name = decodeURIComponent(location.hash.slice(1)); } catch { return; }
    const target = name && document.getElementById(name);
    if (!target) return;
    for (let at = target; at; at = at.parentElement) {
      if (at.tagName === "DETAILS") { at.open = true; at.hidden = false; }
    }
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const bar = event.target.closest("[data-to]");
    if (bar) location.hash = bar.dataset.to;
    if (bar || event.target.closest("a[href^='#']")) setTimeout(reveal);
  });
  reveal();
})();
