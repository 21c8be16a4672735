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

  // Gradio 6.31 leaks: a status tracker that is removed while it is pending, as the page's first one always is, redraws its hidden
  // timer in every frame, for ever (3 % of a core each). A timer runs only while one can be seen.
  const nextFrame = window.requestAnimationFrame.bind(window);
  const isTimer = (callback) => /performance\.now\(\)-.{1,9}\)\/1e3/.test(String(callback));
  window.requestAnimationFrame = (callback) => (isTimer(callback) && !document.querySelector(".progress-text") ? 0 : nextFrame(callback));

  // The address names the open tab, so that a reload shows it again.
  window.bdAddress = (tab) => {
    const url = new URL(window.location);
    url.search = tab === "compare" ? "" : `?tab=${tab}`;
    history.replaceState(history.state, "", url);
  };

  // Compare: Ctrl+Enter generates (in the follow-up field: asks both), Esc stops.
  const press = (id) => {
    const button = document.getElementById(id);
    if (!button || button.disabled || button.offsetParent === null) return false;
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

  // (end of Compare)

  // Label: keys

  // (end of Label)
})();
