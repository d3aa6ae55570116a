// The pieces of the part Learn that a reader moves; amedlib/study/lesson.py writes them. Where this
// script does not run, or Plotly does not load, every piece shows its still picture.
(() => {
  "use strict";
  const source = new URL("plotly/plotly-basic.min.js", document.currentScript.src).href;
  const settings = { displayModeBar: false, responsive: true };
  let loading;

  // Plotly, once for all pieces of a page, and only on pages that draw with it.
  function plotly() {
    loading ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = source;
      script.onload = () => resolve(window.Plotly);
      script.onerror = reject;
      document.head.append(script);
    });
    return loading;
  }

  // A slider counts in whole steps; what it stands for is in the list.
  const chosen = (control) =>
    control.type === "range" ? JSON.parse(control.dataset.values)[control.value] : control.value;

  function drawPlot(box, view, frame) {
    // A line without points is not in the legend either.
    const data = view.data.map((style, i) => ({
      ...style,
      x: frame.x[i],
      y: frame.y[i],
      showlegend: style.showlegend && frame.x[i].length > 0,
    }));
    const layout = { ...view.layout, datarevision: frame.key };
    ["xaxis", "yaxis"].forEach((axis, i) => {
      const range = frame.ranges[i];
      layout[axis] = { ...layout[axis], range };
      // The numbers 1, 2 and 5 of every decade have room on two decades, and on more only 1.
      if (layout[axis].type === "log") layout[axis].dtick = Math.abs(range[1] - range[0]) > 2 ? 1 : "D2";
    });
    return plotly().then((Plotly) => Plotly.react(box.querySelector(".plot"), data, layout, settings));
  }

  function show(box, view, frame) {
    const still = box.querySelector("img");
    box.querySelector(".says").textContent = frame.says;
    if (frame.image) {
      still.src = frame.image;
      still.alt = frame.alt;
      return;
    }
    const plot = box.querySelector(".plot");
    plot.setAttribute("aria-label", frame.alt);
    drawPlot(box, view, frame).then(() => {
      still.hidden = true;
    });
  }

  // Moves a slider by itself, from its start to its end; a second press stops it.
  function play(button, control) {
    let timer;
    const stop = () => {
      clearInterval(timer);
      timer = undefined;
      button.textContent = "Play";
    };
    button.addEventListener("click", () => {
      if (timer) return stop();
      if (control.value === control.max) control.value = control.min;
      else control.stepUp();
      control.dispatchEvent(new Event("input"));
      button.textContent = "Stop";
      timer = setInterval(() => {
        if (control.value === control.max) return stop();
        control.stepUp();
        control.dispatchEvent(new Event("input"));
      }, 200);
    });
  }

  function begin(piece) {
    const { views, frames } = JSON.parse(piece.querySelector("script").textContent);
    const boxes = [...piece.querySelectorAll(".view")];
    const controls = [...piece.querySelectorAll("[name]")];
    const shown = [];
    const update = () => {
      const values = Object.fromEntries(controls.map((c) => [c.name, chosen(c)]));
      views.forEach((view, i) => {
        const key = view.follows.map((name) => values[name]).join("|");
        if (shown[i] === key) return;
        shown[i] = key;
        show(boxes[i], view, { key, ...frames[view.frames][key] });
      });
    };
    for (const control of controls) {
      control.addEventListener("input", () => {
        if (control.type === "range") {
          control.setAttribute("aria-valuetext", chosen(control));
          control.nextElementSibling.textContent = chosen(control);
        }
        update();
      });
    }
    piece.querySelectorAll("button").forEach((b) => play(b, piece.querySelector(`[name="${b.value}"]`)));
    piece.querySelector(".controls").hidden = false;
    update();
  }

  const ready = () => document.querySelectorAll(".lesson").forEach(begin);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", ready);
  else ready();
})();
