// Runs in every page: the content warning, keys, copy buttons. No library, no other host.
(() => {
  "use strict";
  const WARNING = "biasdpo-content-warning";
  const root = document.documentElement;

  // Storage may be refused (a Space in a frame, private windows): the warning is then shown on every visit.
  try {
    if (localStorage.getItem(WARNING) === "dismissed") root.classList.add("bd-warned");
  } catch { /* shown */ }

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Plain http to another machine has no clipboard API.
      const box = document.createElement("textarea");
      box.value = text;
      box.style.position = "fixed";
      box.style.opacity = "0";
      document.body.append(box);
      box.select();
      const done = document.execCommand("copy");
      box.remove();
      return done;
    }
  };

  const say = (button, text) => {
    button.dataset.label ??= button.textContent;
    button.textContent = text;
    clearTimeout(button.bdTimer);
    button.bdTimer = setTimeout(() => { button.textContent = button.dataset.label; }, 1500);
  };

  document.addEventListener("click", async (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (target?.closest("#dismiss-warning")) {
      root.classList.add("bd-warned");
      try { localStorage.setItem(WARNING, "dismissed"); } catch { /* this visit only */ }
      document.querySelector("#prompt textarea")?.focus();
      return;
    }
    const button = target?.closest(".bd-copy");
    if (button) {
      const text = button.dataset.text ?? document.querySelector(`#${button.dataset.copies} textarea`)?.value ?? "";
      say(button, !text ? "Nothing yet" : (await copy(text)) ? "Copied" : "Not allowed");
    }
  });

  const visible = (id) => {
    const element = document.getElementById(id);
    return element && element.offsetParent !== null ? element : null;
  };

  // The Label tab's keys. Arrows have names of their own where they already mean something (tabs, sliders, lists).
  const VERDICTS = {
    1: "answer-left", ArrowLeft: "answer-left", 2: "answer-right", ArrowRight: "answer-right", 3: "answer-tie", ArrowDown: "answer-tie",
    4: "answer-both-biased", ArrowUp: "answer-both-biased", 5: "answer-skip", u: "undo", U: "undo",
  };
  const WRITES = "input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable], [role=listbox], [role=combobox]";

  const labelKey = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !visible("answer-left")) return false;
    const at = event.target instanceof Element ? event.target : document.body;
    if (event.key === "Escape" && at.closest("#label-panes, #judgment-details")) {
      at.blur();  // from an edit back to the keys
      return true;
    }
    if (at.closest(WRITES)) return false;
    if (event.key.startsWith("Arrow") && (event.shiftKey || at.closest("[role=tab], [role=tablist]"))) return false;
    if (event.key === "e" || event.key === "E") {
      document.querySelector("#editing input")?.click();
      return true;
    }
    const button = VERDICTS[event.key] && visible(VERDICTS[event.key]);
    button?.click();
    return Boolean(button);
  };

  document.addEventListener("keydown", (event) => {
    if (labelKey(event)) {
      event.preventDefault();
      event.stopPropagation();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && visible("generate")) {
      event.preventDefault();
      event.stopPropagation();
      document.getElementById("generate").click();
    } else if (event.key === "Escape" && !document.querySelector("[role=listbox]") && visible("stop") && document.querySelector("#notice .bd-busy")) {
      document.getElementById("stop").click();
    }
  }, true);

  // The data set's table: a click anywhere on a row chooses it, and so does Enter on its button; arrows go from row to row.
  window.bdTable = (element, trigger) => {
    element.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-id]");
      if (!row || (event.detail && String(getSelection()))) return;  // marking text with the mouse chooses nothing
      for (const other of element.querySelectorAll("tr[data-id]")) {
        other.toggleAttribute("aria-current", other === row);
        other.querySelector("button").tabIndex = other === row ? 0 : -1;
      }
      row.setAttribute("aria-current", "true");
      trigger("click", { id: row.dataset.id });
    });
    element.addEventListener("keydown", (event) => {
      const buttons = [...element.querySelectorAll("tr[data-id] button")];
      const at = buttons.indexOf(document.activeElement);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (at < 0 || to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const next = buttons[Math.min(Math.max(to, 0), buttons.length - 1)];
      buttons[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  };

  // What is drawn anew every second while a run trains must not take the focus with it: what has a `data-focus` gets it back.
  let focused = null;  // { key, box }
  const keepsFocus = new MutationObserver(() => {
    if (!focused || document.activeElement !== document.body) return;
    focused.box.querySelector(`[data-focus="${CSS.escape(focused.key)}"]`)?.focus({ preventScroll: true });
  });
  document.addEventListener("focusin", (event) => {
    const element = event.target instanceof Element ? event.target.closest("[data-focus]") : null;
    const box = element?.closest(".html-container");
    keepsFocus.disconnect();
    focused = box ? { key: element.dataset.focus, box } : null;
    if (box) keepsFocus.observe(box, { childList: true, subtree: true });
  });
  document.addEventListener("pointerdown", () => { focused = null; });

  // After the page has drawn what has changed: the focus goes to the first of these that is there, or a box comes into view.
  const drawn = (then) => requestAnimationFrame(() => setTimeout(then, 60));
  window.bdFocus = (...selectors) => drawn(() => {
    const found = selectors.map((selector) => document.querySelector(selector)).find((element) => element && element.offsetParent);
    found?.focus();
  });
  window.bdShow = (id) => drawn(() => {
    const box = visible(id);
    if (box && (box.getBoundingClientRect().top < 0 || box.getBoundingClientRect().top > innerHeight - 120)) box.scrollIntoView();
  });

  // The address names the run that is shown on the Train tab, and nothing of it elsewhere: a reload shows the same.
  let shownRun = "";
  const address = (run) => {
    const url = new URL(window.location);
    if (run === (url.searchParams.get("run") ?? "")) return;
    if (run) url.searchParams.set("run", run); else url.searchParams.delete("run");
    history.replaceState(history.state, "", url);
  };
  window.bdTrainTab = (shown) => address(shown ? shownRun : "");
  window.bdAddress = (run) => { shownRun = run; if (visible("train-machine") || visible("train-table") || !run) address(run); };

  window.bdCopyLink = (query) => {
    const address = query.startsWith("?") ? window.location.origin + window.location.pathname + query : query;
    const button = document.getElementById("copy-link");
    copy(address).then((done) => button && say(button, done ? "Copied" : "Copy it below"));
    return address;
  };
})();
