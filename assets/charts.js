// The Train tab's charts: a cross-hair with the values under it (mouse, or arrow keys), and each chart as SVG, CSV or full screen.
// A figure's drawn points are in its `data-curves`, the logged numbers come from the app; its plot says which steps it spans (data-x) and where its frame is (data-frame).
(() => {
  "use strict";
  const curvesOf = (figure) => (figure.bdCurves ??= JSON.parse(figure.dataset.curves));

  const spanOf = (plot) => {
    const [low, high] = plot.dataset.x.split(" ").map(Number);
    const [left, right] = plot.dataset.frame.split(" ").map(Number);
    return { low, high, left, right };
  };

  const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));

  const point = (figure, step) => {
    const plot = figure.querySelector(".bd-plot");
    const { low, high, left, right } = spanOf(plot);
    const every = curvesOf(figure).map((curve) => ({ ...curve, at: nearest(curve.points, step) }));
    const closest = nearest(every.map((curve) => curve.at), step)[0];
    figure.bdStep = closest;
    const x = left + ((closest - low) / (high - low)) * (right - left);
    const cross = plot.querySelector(".bd-cross");
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.setAttribute("visibility", "visible");
    const tip = figure.querySelector(".bd-tip");
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: `step ${closest.toLocaleString("en", { maximumFractionDigits: 0 })}` }));
    for (const curve of every) {
      if (Math.abs(curve.at[0] - closest) > (high - low) / 6) continue;  // it has no point near this one
      const own = Math.round(curve.at[0]) === Math.round(closest) ? "" : ` (step ${Math.round(curve.at[0])})`;
      const line = document.createElement("div");
      line.className = `bd-c${curve.colour}`;
      line.append(document.createElement("i"), `${curve.name} ${curve.at[1]}${own}`);
      tip.append(line);
    }
    tip.hidden = false;
    const share = x / plot.viewBox.baseVal.width;
    tip.style.left = share < 0.5 ? `${100 * share + 2}%` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `${100 * (1 - share) + 2}%`;
  };

  // A chart that is drawn anew, while a run trains, keeps its cross-hair.
  let held = null;  // { name, step, box }
  const redrawn = new MutationObserver(() => {
    const figure = held && [...held.box.querySelectorAll(".bd-curve")].find((other) => other.dataset.name === held.name);
    if (figure?.querySelector(".bd-tip").hidden) point(figure, held.step);
  });
  const hold = (figure) => {
    const box = figure.closest(".html-container");
    if (!box) return;
    if (held?.box !== box) {
      redrawn.disconnect();
      redrawn.observe(box, { childList: true, subtree: true });
    }
    held = { name: figure.dataset.name, step: figure.bdStep, box };
  };

  const leave = (figure) => {
    if (figure?.isConnected) held = null;
    figure?.querySelector(".bd-cross")?.setAttribute("visibility", "hidden");
    const tip = figure?.querySelector(".bd-tip");
    if (tip) tip.hidden = true;
  };

  const figureOf = (event) => (event.target instanceof Element ? event.target.closest(".bd-plot[data-x]")?.closest(".bd-curve") : null);

  document.addEventListener("pointermove", (event) => {
    const figure = figureOf(event);
    if (!figure) return;
    const plot = figure.querySelector(".bd-plot");
    const { low, high, left, right } = spanOf(plot);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    point(figure, low + ((at.x - left) / (right - left)) * (high - low));
    hold(figure);
  });
  document.addEventListener("pointerout", (event) => {
    const figure = figureOf(event);
    if (figure && !(event.relatedTarget instanceof Element && figure.querySelector(".bd-plot").contains(event.relatedTarget))) leave(figure);
  });
  document.addEventListener("focusout", (event) => leave(figureOf(event)));
  document.addEventListener("keydown", (event) => {
    const figure = figureOf(event);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!figure || !by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const steps = [...new Set(curvesOf(figure).flatMap((curve) => curve.points.map(([step]) => step)))].sort((a, b) => a - b);
    const at = figure.bdStep === undefined ? (by > 0 ? -1 : steps.length) : steps.indexOf(figure.bdStep);
    point(figure, steps[Math.min(Math.max(at + by, 0), steps.length - 1)]);
    hold(figure);
  });

  const save = window.bdSave = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // The numbers as they were logged: a long curve is drawn thinned.
  const boxes = new WeakMap();  // of charts: what answers for them
  window.bdCurves = (element, server) => boxes.set(element, server);
  const saveCsv = async (figure) => {
    let box = figure;
    while (box && !boxes.has(box)) box = box.parentElement;
    const chart = figure.dataset.name;
    const runs = JSON.parse(figure.closest("[data-runs]").dataset.runs);
    const answer = await boxes.get(box).logged_csv({ chart, runs }).catch(() => null);
    if (answer?.csv) return save(`${chart}.csv`, "text/csv", answer.csv);
    const tip = figure.querySelector(".bd-tip");
    tip.textContent = `Not saved: ${answer?.error ?? "the app does not answer"}`;
    tip.hidden = false;
  };

  // A picture stands alone: what the style sheet says is written into it, with the colours of the page as it is now.
  const STYLED = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font-size", "font-family"];
  const picture = (figure) => {
    const plot = figure.querySelector(".bd-plot");
    const made = plot.cloneNode(true);
    const from = [...plot.querySelectorAll("*")];
    [...made.querySelectorAll("*")].forEach((element, i) => {
      const style = getComputedStyle(from[i]);
      for (const name of STYLED) element.setAttribute(name, style.getPropertyValue(name));
    });
    made.querySelector(".bd-cross")?.remove();
    const { width, height } = plot.viewBox.baseVal;
    made.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    made.setAttribute("width", 2 * width);
    made.setAttribute("height", 2 * height);
    const back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["width", "100%"], ["height", "100%"], ["fill", getComputedStyle(figure).backgroundColor]]) back.setAttribute(name, value);
    made.prepend(back);
    return new XMLSerializer().serializeToString(made);
  };

  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("button[data-curve]") : null;
    if (!button) return;
    const figure = button.closest(".bd-curve");
    const name = figure.dataset.name;
    if (button.dataset.curve === "csv") saveCsv(figure);
    else if (button.dataset.curve === "svg") save(`${name}.svg`, "image/svg+xml", picture(figure));
    else if (document.fullscreenElement) document.exitFullscreen();
    else figure.requestFullscreen?.();
  });
})();
