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
