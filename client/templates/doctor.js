"use strict";
// Shows the slices that lie in the page's sheets, through a window, with the model's marks over them.
(async () => {
  const { sheets, numSlices, legend } = JSON.parse(document.getElementById("viewer").textContent);
  const one = (id) => document.getElementById(id);
  const stage = one("stage"), canvas = one("canvas"), slider = one("slice");
  const overlay = one("overlay"), opacity = one("opacity");
  const preset = one("preset"), centre = one("centre"), width = one("width");
  const { rows, columns, levels, unit, presets } = sheets;
  const images = [...document.querySelectorAll("img.sheet")];
  const marks = [...document.querySelectorAll("img.marks")];
  const colours = legend.map((l) => [1, 3, 5].map((at) => parseInt(l.colour.slice(at, at + 2), 16)));
  const perSheet = sheets.across * sheets.down;
  const screen = canvas.getContext("2d");
  const bench = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const tools = bench.getContext("2d", { willReadFrequently: true });
  const state = { slice: sheets.first_shown, centre: 0, width: 1, pixels: null };
  await Promise.all([...images, ...marks].map((image) => image.decode()));
  canvas.style.aspectRatio = `1 / ${sheets.height_per_width}`;

  function tile(list, slice) {
    const inside = slice % perSheet;
    const x = (inside % sheets.across) * sheets.tile_columns;
    const y = Math.floor(inside / sheets.across) * sheets.tile_rows;
    tools.drawImage(list[Math.floor(slice / perSheet)], x, y, columns, rows, 0, 0, columns, rows);
    return tools.getImageData(0, 0, columns, rows).data;
  }
  function greys() {
    const low = state.centre - state.width / 2;
    return levels.map((value) => Math.max(0, Math.min(255, (255 * (value - low)) / state.width)));
  }
  function draw() {
    const pixels = tile(images, state.slice);
    state.pixels = pixels;
    const shown = screen.createImageData(columns, rows), out = shown.data, grey = greys();
    for (let at = 0; at < out.length; at += 4) {
      out[at] = out[at + 1] = out[at + 2] = grey[pixels[at]];
      out[at + 3] = 255;
    }
    if (marks.length && overlay.checked) paint(out, tile(marks, state.slice).slice());
    screen.putImageData(shown, 0, 0);
    tell();
  }
  function paint(out, labels) {
    const share = Number(opacity.value) / 100, line = 4 * columns;
    for (let at = 0; at < out.length; at += 4) {
      const label = labels[at];
      if (!label) continue;
      const isEdge = labels[at - 4] !== label || labels[at + 4] !== label ||
        labels[at - line] !== label || labels[at + line] !== label;
      const own = isEdge ? Math.max(share, 0.9) : share, colour = colours[label - 1];
      for (let c = 0; c < 3; c++) out[at + c] = (1 - own) * out[at + c] + own * colour[c];
    }
  }
  function tell() {
    one("where").textContent = `${state.slice + 1} / ${numSlices}`;
    stage.setAttribute("aria-label", `Slice ${state.slice + 1} of ${numSlices}`);
    if (slider) slider.value = state.slice;
  }
  function go(slice) {
    state.slice = Math.max(0, Math.min(numSlices - 1, slice));
    draw();
  }
  function look(newCentre, newWidth, name) {
    const tidy = (value) => Number(value.toPrecision(4));
    state.centre = newCentre;
    state.width = Math.max(newWidth, 1e-6);
    centre.value = tidy(state.centre);
    width.value = tidy(state.width);
    preset.value = name;
    draw();
  }
  const choose = (place) => look(presets[place].centre, presets[place].width, String(place));

  if (slider) slider.addEventListener("input", () => go(Number(slider.value)));
  if (overlay) {
    overlay.addEventListener("change", draw);
    opacity.addEventListener("input", draw);
  }
  preset.addEventListener("change", () => choose(Number(preset.value)));
  for (const field of [centre, width]) {
    field.addEventListener("change", () => {
      if (width.value > 0) look(Number(centre.value), Number(width.value), "own");
    });
  }
  let turned = 0;
  stage.addEventListener("wheel", (event) => {
    if (numSlices === 1 || event.ctrlKey) return;
    event.preventDefault();
    turned += event.deltaMode === 0 ? event.deltaY / 100 : event.deltaY;
    const steps = Math.trunc(turned);
    turned -= steps;
    if (steps) go(state.slice + steps);
  }, { passive: false });

  let held = null;
  stage.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, y: event.clientY, slice: state.slice, centre: state.centre, width: state.width };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    probe(event);
    if (!held) return;
    const x = event.clientX - held.x, y = event.clientY - held.y;
    if (event.pointerType === "mouse") {
      if (Math.abs(x) + Math.abs(y) < 4) return;
      const step = presets[0].width / 300;
      look(held.centre + y * step, Math.max(held.width + x * step, step), "own");
    } else {
      go(held.slice + Math.round(x / Math.max(6, 240 / numSlices)));
    }
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { held = null; });
  stage.addEventListener("pointerleave", () => { one("value").textContent = ""; });
  function probe(event) {
    const box = canvas.getBoundingClientRect(), ratio = 1 / sheets.height_per_width;
    const w = Math.min(box.width, box.height * ratio), h = w / ratio;
    const x = Math.floor(((event.clientX - box.left - (box.width - w) / 2) / w) * columns);
    const y = Math.floor(((event.clientY - box.top - (box.height - h) / 2) / h) * rows);
    const isIn = x >= 0 && y >= 0 && x < columns && y < rows && state.pixels;
    const value = isIn ? levels[state.pixels[4 * (y * columns + x)]] : null;
    one("value").textContent = isIn ? `about ${Number(value.toPrecision(3))} ${unit}` : "";
  }

  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input, select, textarea");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const isReading = event.target === stage;
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    if (isReading) Object.assign(moves, { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -numSlices, End: numSlices });
    if (event.key in moves) go(state.slice + moves[event.key]);
    else if (event.key.toLowerCase() === "o" && overlay) { overlay.checked = !overlay.checked; draw(); }
    else if (/^[1-9]$/.test(event.key) && presets[event.key - 1]) choose(event.key - 1);
    else return;
    event.preventDefault();
  });
  for (const button of document.querySelectorAll("button.go")) {
    button.addEventListener("click", () => go(Number(button.dataset.slice)));
  }
  choose(0);
})();
