// What Gradio has no component for: a dismissible warning, keyboard shortcuts, the page's address, copying a link.
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
