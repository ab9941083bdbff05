"use strict";

// Charts: a pointer beside the curves tells their values.
const told = document.getElementById("told");

function near(points, x) {
  let best = null;
  for (const point of points) if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  return best;
}

function show(chart, data, event) {
  const box = chart.getBoundingClientRect(), zoom = chart.viewBox.baseVal.width / box.width;
  const [left, right, low, high, top, bottom] = data.frame;
  const share = ((event.clientX - box.left) * zoom - left) / (right - left);
  if (share < -0.02 || share > 1.02) return hide(chart);
  const x = low + share * (high - low);
  const found = data.lines.map((line) => ({ line, point: near(line.points, x) })).filter((each) => each.point);
  if (!found.length) return hide(chart);
  const at = found.reduce((a, b) => (Math.abs(a.point[0] - x) <= Math.abs(b.point[0] - x) ? a : b)).point[0];
  const place = left + ((at - low) / (high - low)) * (right - left);
  let pointer = chart.querySelector(".pointer");
  if (!pointer) {
    pointer = document.createElementNS("http://www.w3.org/2000/svg", "line");
    pointer.setAttribute("class", "pointer");
    chart.append(pointer);
  }
  for (const [name, value] of [["x1", place], ["x2", place], ["y1", top], ["y2", bottom]]) pointer.setAttribute(name, value);
  const close = (point) => Math.abs(point[0] - at) <= 0.02 * (high - low);  // a run that has ended has no value here
  const rows = found.filter(({ point }) => close(point)).map(({ line, point }) => row(`key c${line.colour}`, text(line, point)));
  told.replaceChildren(row("", `${data.x} ${at}`), ...rows);
  told.hidden = false;
  told.style.left = `${Math.min(event.clientX + 16, innerWidth - told.offsetWidth - 8)}px`;
  told.style.top = `${Math.min(event.clientY + 16, innerHeight - told.offsetHeight - 8)}px`;
}

function text(line, point) {
  const values = line.points.filter((each) => each[0] === point[0]).map((each) => each[1] ?? "not finite");
  return `${line.label}: ${values.join(", ")}`;
}

function row(kind, words) {
  const line = document.createElement("div"), mark = document.createElement("span");
  mark.className = kind;
  line.append(mark, words);
  return line;
}

function hide(chart) {
  told.hidden = true;
  chart.querySelector(".pointer")?.remove();
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.dataset.chart);
  chart.addEventListener("pointermove", (event) => show(chart, data, event));
  chart.addEventListener("pointerleave", () => hide(chart));
}

// Galleries: the slider chooses the epoch.
for (const gallery of document.querySelectorAll(".gallery")) {
  const slider = gallery.querySelector("input"), frames = gallery.querySelectorAll("img");
  const choose = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
    gallery.querySelector("output").textContent = frames[slider.value].alt;
  };
  slider.addEventListener("input", choose);
  choose();
}
