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

  // Compare: keys

  // (end of Compare)

  // Label: keys

  // (end of Label)
})();
