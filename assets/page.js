// What Gradio has no component for: a dismissible warning, keyboard shortcuts, the page's address. Loaded before Gradio's scripts.
(() => {
  "use strict";
  const WARNING = "biasdpo-content-warning";
  const root = document.documentElement;

  // Storage may be refused (a Space in a frame, private windows): the warning then shows on every visit.
  try {
    if (localStorage.getItem(WARNING) === "dismissed") root.classList.add("warning-dismissed");
  } catch { /* shown */ }

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest("#dismiss-warning")) return;
    root.classList.add("warning-dismissed");
    try { localStorage.setItem(WARNING, "dismissed"); } catch { /* this visit only */ }
    document.querySelector("#prompt textarea")?.focus();
  });

  // An error stays until it is closed, or until the next try: what a button or Enter starts now may have mended it.
  const closeErrors = (event) => {
    if (!(event.target instanceof Element) || !event.target.closest(event.type === "click" ? "button:not(.toast-close, .label-wrap, [role=tab])" : "input, textarea")) return;
    if (event.type === "click" || event.key === "Enter") document.querySelectorAll(".toast-body.error .toast-close").forEach((close) => close.click());
  };
  for (const type of ["click", "keydown"]) document.addEventListener(type, closeErrors, true);

  // Gradio 6.31 leaks: a status tracker that is removed while it is pending, as the page's first one always is, redraws its hidden
  // timer in every frame, for ever (3% of a core each). A timer runs only while one can be seen.
  const nextFrame = window.requestAnimationFrame.bind(window);
  const isTimer = (callback) => /performance\.now\(\)-.{1,9}\)\/1e3/.test(String(callback));
  window.requestAnimationFrame = (callback) => (isTimer(callback) && !document.querySelector(".progress-text") ? 0 : nextFrame(callback));

  // At each message of any event Gradio 6.31 tells every component that was ever an event's input that this event is over, and
  // searches the whole page for each: two thirds of what watching a run cost.
  const entries = Object.entries;
  const isOver = ([id, status]) => status?.type === "input" && status.stream_state === "closed" && `${status.component_id}` === id;
  Object.entries = (value) => {
    const all = entries(value);
    return !Array.isArray(value) && /^\d/.test(all[0]?.[0]) ? all.filter((one) => !isOver(one)) : all;
  };

  // For a new value Gradio 6.31 draws a chart twice: into the old element, and into a new one that replaces it. Plotly keeps the
  // old one for ever, since that listens for the window's size.
  let plotly;
  const isDrawn = (chart) => chart._fullLayout !== undefined;
  Object.defineProperty(window, "Plotly", {
    configurable: true,
    get: () => plotly,
    set: (loaded) => {
      plotly = loaded;
      const { react } = loaded;
      loaded.react = (chart, ...figure) => (isDrawn(chart) ? Promise.resolve(chart) : react(chart, ...figure));
    },
  });
  const purgeCharts = (records) => {
    for (const node of records.flatMap((record) => [...record.removedNodes])) {
      if (node.nodeType !== Node.ELEMENT_NODE || node.isConnected) continue;
      for (const chart of node.matches(".js-plotly-plot") ? [node] : node.querySelectorAll(".js-plotly-plot")) {
        setTimeout(() => plotly.purge(chart), 1000); // when it is not being drawn any more
      }
    }
  };

  // Gradio 6.31 gives the check boxes of its tables no name, and puts each into an element with the role of a button; it names an
  // empty chart without giving it a role.
  const repairRoles = () => {
    for (const empty of document.querySelectorAll(".empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
    for (const cell of document.querySelectorAll(":is(.select-all-checkbox, .bool-cell)[role]")) {
      for (const name of ["role", "tabindex"]) cell.removeAttribute(name);
      cell.querySelector("input")?.setAttribute("aria-label", cell.matches(".bool-cell") ? "Select this row" : "Select all rows");
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    const repair = (records) => { purgeCharts(records); repairRoles(); };
    new MutationObserver(repair).observe(document.body, { childList: true, subtree: true });
  });

  // The address names the open tab and the job it shows, so that a reload shows them again.
  const jobs = {};
  let shown = null;
  window.bdAddress = (tab, job) => {
    const isFirst = shown === null; // Gradio selects the first tab before the address that the page was opened with is read
    if (job === undefined) shown = tab;
    else jobs[tab] = job;
    if (isFirst || shown !== tab) return;
    const url = new URL(window.location);
    url.search = tab === "compare" ? "" : `?tab=${tab}` + (jobs[tab] ? `&job=${encodeURIComponent(jobs[tab])}` : "");
    history.replaceState(history.state, "", url);
  };

  // Compare: Ctrl+Enter generates (in the follow-up field: asks both), Esc stops.
  const visible = (id) => [document.getElementById(id)].find((element) => element?.offsetParent);
  const press = (id) => {
    const button = visible(id);
    if (!button || button.disabled) return false;
    button.click();
    return true;
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const inFollowUp = event.target instanceof Element && event.target.closest("#follow-up");
      if (!press(inFollowUp ? "ask-both" : "generate")) return;
      event.preventDefault();
      event.stopPropagation();
    } else if (event.key === "Escape" && !document.querySelector("[role=listbox]")) press("stop");
  }, true);

  // Label: keys (Gradio has no shortcuts)
  const LABEL_KEYS = {
    1: "answer-left", ArrowLeft: "answer-left", 2: "answer-right", ArrowRight: "answer-right", 3: "answer-tie", ArrowDown: "answer-tie",
    4: "answer-both-biased", ArrowUp: "answer-both-biased", 5: "answer-both-unusable", s: "answer-skip", u: "undo", e: "editing",
  };
  const WRITES = "input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable=true], [role=listbox], [role=combobox], [role=gridcell]";
  const HAS_ARROWS = "[role=tab], [role=tablist]";  // where arrow keys have a meaning of their own

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.defaultPrevented || !visible("answer-left")) return;
    const at = event.target instanceof Element ? event.target : document.body;
    if (event.key === "Escape" && at.closest("#label-panes, #judgment-details")) at.blur();  // from typing back to the keys
    if (at.closest(WRITES) && !at.disabled) return;
    if (event.key.startsWith("Arrow") && (event.shiftKey || at.closest(HAS_ARROWS))) return;
    const element = visible(LABEL_KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key]);
    if (!element) return;
    event.preventDefault();
    (element.querySelector("input") ?? element).click();
  });
})();
