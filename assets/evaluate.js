// The Evaluate tab: an item that flipped goes to another tab, results are saved as files, the address names the evaluation.
(() => {
  "use strict";
  const TYPES = { md: "text/markdown", csv: "text/csv", json: "application/json" };

  window.bdFlips = (element, trigger) => element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-flip]");
    if (button) trigger("click", { id: button.dataset.flip, to: button.dataset.to });
  });

  window.bdSaves = (element, server) => element.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-save]");
    if (!button) return;
    const box = button.closest(".bd-saves");
    const said = box.querySelector("[role=status]");
    said.textContent = "…";
    const kind = button.dataset.save;
    const answer = await server.saved({ kind, ids: JSON.parse(box.dataset.ids) }).catch(() => null);
    said.textContent = answer?.text === undefined ? `Not saved: ${answer?.error ?? "the app does not answer"}` : `Saved: ${answer.name}`;
    if (answer?.text !== undefined) window.bdSave(answer.name, TYPES[kind], answer.text);
  });

  // The address names the evaluation that the tab shows, and nothing of it elsewhere: a reload shows the same.
  let shown = "";
  const address = (id) => {
    const url = new URL(window.location);
    if (id === (url.searchParams.get("evaluation") ?? "")) return;
    if (id) url.searchParams.set("evaluation", id); else url.searchParams.delete("evaluation");
    history.replaceState(history.state, "", url);
  };
  const open = () => Boolean(document.getElementById("eval-machine")?.offsetParent ?? document.getElementById("eval-table")?.offsetParent);
  window.bdEvaluateTab = (isOpen) => address(isOpen ? shown : "");
  window.bdEvaluation = (id) => { shown = id; if (open() || !id) address(id); };
})();
