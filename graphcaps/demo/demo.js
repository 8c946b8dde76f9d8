// The live demo: what is drawn, or taken from the gallery, is routed and shown at once.

const data = JSON.parse(byId("net").textContent);
const net = new CapsNet(data.config, data.net, data.options);
const { height: size, channels } = data.image; // images are square
const dim = data.config.parent_dim;
const PIXEL = SHEET / size; // units of the sheet
const LARGEST_SHIFT = 12; // pixels
const PEN_STEP = 6; // units that an arrow key moves the pen
const REMEMBERED_AFTER = 300; // milliseconds without a change
const SHOWN_RIGHT = 22; // test images in the gallery

const state = {
  mode: "one",
  routing: data.config.routing,
  drawing: new Drawing(),
  image: 0, // of the gallery; null where the drawing is shown
  layers: [], // [{ image, or null for the drawing; x, y }, likewise]
  layer: 0, // the one that is moved and exchanged
  pen: { x: SHEET / 2, y: SHEET / 2, down: false, shown: false },
};

const explorer = new Explorer(
  { ...data, decoder: net.decoder, routing: () => state.routing },
  { changed },
);

// the gallery

const gallery = {
  ...data.gallery,
  sheet: await unpackSheet(data.gallery.sheet),
  byNumber: new Map(data.gallery.numbers.map((number, n) => [number, n])),
};

async function unpackSheet(png) {
  const picture = new Image();
  picture.src = `data:image/png;base64,${png}`;
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context;
}

/** Image n of the gallery, 0 to 1, [C, H, W]. */
function pixelsOf(n) {
  const [left, top] = [(n % gallery.columns) * size, Math.floor(n / gallery.columns) * size];
  const tile = gallery.sheet.getImageData(left, top, size, size).data;
  const area = size * size;
  return Float32Array.from({ length: channels * area }, (_, at) => {
    return tile[4 * (at % area) + Math.floor(at / area)] / 255;
  });
}

function describe(n) {
  return `Test image ${gallery.numbers[n]}, ${namesOf(gallery.labels[n], data.classes)}`;
}

function buildGallery() {
  const { mistakes, predicted, labels, numbers } = gallery;
  const right = range(numbers.length).filter((n) => !mistakes.includes(n));
  for (const n of right.slice(0, SHOWN_RIGHT)) buildPick(byId("right"), n, "");
  mistakes.forEach((n, which) => {
    const [truth, taken] = [labels[n], predicted[which]].map((of) => namesOf(of, data.classes));
    buildPick(byId("wrong"), n, `✗ ${truth} → ${taken}`);
  });
  byId("errors").hidden = !mistakes.length;
  set(byId("number"), { max: numbers.at(-1), value: numbers[0] });
  byId("take").addEventListener("click", takeNumber);
  byId("number").addEventListener("keydown", ({ key }) => key === "Enter" && takeNumber());
  byId("any").addEventListener("click", () => {
    take(Math.floor(Math.random() * gallery.numbers.length));
  });
}

function buildPick(parent, n, name) {
  const pick = make(parent, "button", { type: "button", class: "pick", "data-n": n });
  set(pick, { "aria-label": `${describe(n)}${name ? `, ${name.slice(2)}` : ""}` });
  const canvas = make(pick, "canvas", { class: explorer.tone });
  paint(canvas, pixelsOf(n), data.image);
  if (name) make(pick, "span", { class: "name" }, name);
  pick.addEventListener("click", () => take(n));
}

function takeNumber() {
  const number = +byId("number").value;
  const n = gallery.byNumber.get(number);
  const count = gallery.numbers.filter((held, place) => held === place).length;
  byId("not-there").textContent = n === undefined
    ? `This page holds numbers 0 to ${count - 1}, and the errors.`
    : "";
  if (n !== undefined) take(n);
}

/** Show an image of the gallery, or lay it in the place of the chosen digit of two. */
function take(n) {
  byId("number").value = gallery.numbers[n];
  if (state.mode === "two") state.layers[state.layer].image = n;
  else state.image = n;
  refresh();
}

// what the net sees

function layerPixels({ image }) {
  return image === null ? drawnPixels().pixels : pixelsOf(image);
}

/** The drawing in as many channels as the net's images have. */
function drawnPixels() {
  const drawn = state.drawing.image(size, data.config.image_kind);
  const pixels = new Float32Array(channels * size * size);
  range(channels).forEach((channel) => pixels.set(drawn.pixels, channel * size * size));
  return { ...drawn, pixels };
}

function shifted(pixels, right, down) {
  return pixels.map((_, at) => {
    const [x, y] = [(at % size) - right, (Math.floor(at / size) % size) - down];
    return x >= 0 && y >= 0 && x < size && y < size ? pixels[at - down * size - right] : 0;
  });
}

/** The image, where it lies on the sheet, its classes if they are known, and a name of it. */
function seen() {
  const whole = { left: 0, top: 0, side: SHEET, truth: null };
  if (state.mode === "two") {
    const moved = state.layers.map((layer) => shifted(layerPixels(layer), layer.x, layer.y));
    const title = `Two images: ${state.layers.map(nameOfLayer).join(" and ")}`;
    return { ...whole, pixels: union(moved), title };
  }
  if (state.image === null) return { ...whole, ...drawnPixels(), title: "Your drawing" };
  const [pixels, truth] = [pixelsOf(state.image), gallery.labels[state.image]];
  return { ...whole, pixels, truth, title: `Test image ${gallery.numbers[state.image]}` };
}

function nameOfLayer({ image }) {
  return image === null
    ? "your drawing"
    : `test image ${gallery.numbers[image]} (${namesOf(gallery.labels[image], data.classes)})`;
}

function lookAt(image) {
  const { layer, rounds } = net.look(image.pixels, state.routing, data.rounds);
  const { votes, strength, parents } = layer;
  const carries = equationsOf(state.routing).sum !== undefined;
  return {
    title: image.title,
    truth: image.truth,
    image: image.pixels,
    dim,
    rounds: rounds.map((round) => ({
      ...round,
      pose: (parent) => round.v.subarray(parent * dim, (parent + 1) * dim),
      amounts: (parent) => carries
        ? sharesOf(votes, round, parent, dim)
        : strength.map((size, child) => round.c[child * parents + parent] * size),
      agreement: (child, parent) => {
        return dot(votes, (child * parents + parent) * dim, round.v, parent * dim, dim);
      },
    })),
  };
}

/** Route what is there now and show it; `keep` keeps the chosen class, child and pose. */
function update({ keep = false } = {}) {
  state.seen = seen();
  paint(byId("seen"), state.seen.pixels, data.image);
  explorer.show(lookAt(state.seen), { keep });
  byId("untrained").hidden = state.routing === data.config.routing;
  if (state.mode === "two") nameLayers();
  showHalves();
  showSheet();
  remember();
}

let waiting = null;

/** Update at the next frame, however many events come before it; all of them have to `keep`. */
function refresh({ keep = false } = {}) {
  if (waiting) {
    waiting.keep &&= keep;
    return;
  }
  waiting = { keep };
  requestAnimationFrame(() => {
    const options = waiting;
    waiting = null;
    update(options);
  });
}

// the sheet

const sheet = byId("sheet");
function showSheet() {
  const context = sheet.getContext("2d");
  const scale = sheet.width / SHEET;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, SHEET, SHEET);
  Object.assign(context, { imageSmoothingEnabled: false, strokeStyle: `rgb(${colours.ink})` });
  const drawing = state.mode === "one" && state.image === null;
  if (state.mode === "two") {
    state.layers.forEach((layer, which) => {
      const place = [layer.x * PIXEL, layer.y * PIXEL, SHEET];
      lay(context, layerPixels(layer), which ? colours.against : colours.for, place);
    });
  } else if (drawing) state.drawing.paintOn(context);
  else lay(context, state.seen.pixels, channels === 1 ? colours.ink : null, [0, 0, SHEET]);
  if (byId("overlay").checked && net.decoder.length && state.mode === "one") {
    const { left, top, side } = state.seen;
    lay(context, explorer.drawnOf(explorer.parent), colours.for, [left, top, side]);
  }
  const { pen } = state;
  if (pen.shown && drawing) {
    Object.assign(context, { lineWidth: pen.down ? 4 : 1.5 });
    context.beginPath();
    context.arc(pen.x, pen.y, PEN / 2, 0, 2 * Math.PI);
    context.stroke();
  }
  byId("hint").hidden = !drawing || !state.drawing.empty;
  const what = drawing && state.drawing.empty ? "Nothing is drawn" : state.seen.title;
  const keys = state.mode === "two"
    ? "Arrow keys move the chosen digit."
    : "Arrow keys move the pen, space puts it down or lifts it, backspace takes back a stroke.";
  set(sheet, { "aria-label": `Sheet. ${what}. ${keys}` });
  byId("undo").disabled = byId("clear").disabled = state.mode === "two";
}

const layOn = document.createElement("canvas");

/** Draw pixels as ink of a colour, or, where that is null, in their own colours. */
function lay(context, pixels, colour, [left, top, side]) {
  paint(layOn, colour ? grey(pixels, data.image) : pixels, data.image, colour ?? INK);
  context.globalAlpha = state.mode === "two" ? 0.75 : 1;
  context.drawImage(layOn, left, top, side, side);
  context.globalAlpha = 1;
}

function placeOf({ clientX, clientY }) {
  const box = sheet.getBoundingClientRect();
  return [clientX - box.left, clientY - box.top].map((x) => (x / box.width) * SHEET);
}

/** Start a stroke; a test image makes place for it. */
function startStroke(x, y) {
  const keep = state.image === null;
  if (!keep) state.drawing = new Drawing();
  state.image = null;
  state.drawing.start(x, y);
  refresh({ keep });
}

let drag = null; // a stroke, or a layer with where it was and where it was taken

sheet.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  sheet.setPointerCapture(event.pointerId);
  sheet.focus({ preventScroll: true });
  state.pen.shown = false;
  const [x, y] = placeOf(event);
  if (state.mode === "two") {
    chooseLayer(layerAt(x, y));
    const { x: right, y: down } = state.layers[state.layer];
    drag = { x: x / PIXEL - right, y: y / PIXEL - down };
  } else {
    drag = {};
    startStroke(x, y);
  }
});

sheet.addEventListener("pointermove", (event) => {
  if (!drag) return;
  if (state.mode === "two") {
    const [x, y] = placeOf(event);
    moveLayer(Math.round(x / PIXEL - drag.x), Math.round(y / PIXEL - drag.y));
    return;
  }
  const events = event.getCoalescedEvents?.() ?? [];
  for (const one of events.length ? events : [event]) {
    if (state.drawing.extend(...placeOf(one))) refresh({ keep: true });
  }
});

for (const kind of ["pointerup", "pointercancel"]) {
  sheet.addEventListener(kind, () => (drag = null));
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

sheet.addEventListener("keydown", (event) => {
  const { key } = event;
  const arrow = ARROWS[key];
  if (!arrow && ![" ", "Backspace"].includes(key)) return;
  event.preventDefault();
  if (state.mode === "two") {
    const { x, y } = state.layers[state.layer];
    if (arrow) moveLayer(x + arrow[0], y + arrow[1]);
    return;
  }
  if (key === "Backspace") undo();
  else movePen(key, arrow);
});

sheet.addEventListener("blur", () => {
  Object.assign(state.pen, { shown: false, down: false });
  showSheet();
});

function movePen(key, arrow) {
  const { pen } = state;
  pen.shown = true;
  if (key === " ") {
    pen.down = !pen.down;
    if (pen.down) startStroke(pen.x, pen.y);
  } else {
    pen.x = clamp(pen.x + PEN_STEP * arrow[0], 0, SHEET - 1);
    pen.y = clamp(pen.y + PEN_STEP * arrow[1], 0, SHEET - 1);
    if (pen.down) state.drawing.extend(pen.x, pen.y);
  }
  if (pen.down) refresh({ keep: true });
  else showSheet();
}

function undo() {
  if (state.image !== null) return;
  state.drawing.strokes.pop();
  refresh({ keep: true });
}

function clear() {
  state.drawing = new Drawing();
  state.image = null;
  refresh();
}

// two digits

function layerAt(x, y) {
  const inkOf = ({ x: right, y: down, ...layer }) => {
    const [column, row] = [Math.floor(x / PIXEL) - right, Math.floor(y / PIXEL) - down];
    const inside = column >= 0 && row >= 0 && column < size && row < size;
    return inside ? layerPixels(layer)[row * size + column] : 0;
  };
  const [first, second] = state.layers.map(inkOf);
  return first === second ? state.layer : first > second ? 0 : 1;
}

function chooseLayer(which) {
  state.layer = which;
  document.getElementsByName("layer")[which].checked = true;
}

function moveLayer(x, y) {
  const layer = state.layers[state.layer];
  layer.x = clamp(x, -LARGEST_SHIFT, LARGEST_SHIFT);
  layer.y = clamp(y, -LARGEST_SHIFT, LARGEST_SHIFT);
  refresh({ keep: true });
}

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  byId("layers").hidden = mode === "one";
}

function chooseMode(mode) {
  setMode(mode);
  if (mode === "two" && !state.layers.length) {
    const [[x, y], [otherX, otherY]] = gallery.apart;
    const [first, other] = gallery.pair;
    const drawn = state.image === null && !state.drawing.empty;
    state.layers = [
      { image: drawn ? null : first, x, y },
      { image: other, x: otherX, y: otherY },
    ];
  }
  refresh();
}

function nameLayers() {
  const names = document.querySelectorAll("#layers .what");
  state.layers.forEach((layer, which) => (names[which].textContent = nameOfLayer(layer)));
}

/** What the capsules of two classes draw, where there are two in an image. */
function showHalves() {
  const shown = net.decoder.length && (state.mode === "two" || data.labelsPerImage === 2);
  byId("halves").hidden = !shown;
  if (!shown) return;
  const { lengths } = explorer.round;
  const two = range(lengths.length).sort((a, b) => lengths[b] - lengths[a]).slice(0, 2);
  const drawn = two.map((parent) => grey(explorer.drawnUnmoved(parent), data.image));
  // the colours of the digits on the sheet, where the capsules are of their classes
  const labels = state.layers.map(({ image }) => (image === null ? null : gallery.labels[image][0]));
  const swapped = labels[0] === two[1] || labels[1] === two[0];
  const tints = swapped ? [colours.against, colours.for] : [colours.for, colours.against];
  document.querySelectorAll("#halves button").forEach((button, which) => {
    const parent = two[which];
    paint(button.firstChild, drawn[which], data.image, tints[which]);
    const { symbol } = explorer.words.measure;
    const text = `${data.classes[parent]}, ${symbol} = ${lengths[parent].toFixed(2)}`;
    button.lastChild.textContent = text;
    set(button, { "aria-label": `Choose ${text}`, "aria-pressed": parent === explorer.parent });
    button.onclick = () => explorer.chooseParent(parent);
  });
  const both = document.querySelector("#halves figure canvas");
  set(both, { "aria-label": `${data.classes[two[0]]} and ${data.classes[two[1]]}, as drawn` });
  paintBoth(both, drawn, data.image, tints);
}

// the address of the page

let toRemember;

/** What the explorer shows was changed: the class, its pose, the iteration, the colours. */
function changed() {
  showHalves();
  showSheet();
  remember();
}

function remember() {
  clearTimeout(toRemember);
  toRemember = setTimeout(() => {
    history.replaceState(null, "", `#${address()}`);
  }, REMEMBERED_AFTER);
}

/** What the page shows, where it is not as at the start. */
function address() {
  const { mode, routing, drawing, image, layers } = state;
  const numberOf = (n) => (n === null ? "drawing" : gallery.numbers[n]);
  const words = new URLSearchParams();
  if (!drawing.empty) words.set("drawing", drawing.toText());
  words.set("show", numberOf(image));
  if (mode === "two") {
    words.set("two", layers.map((layer) => [numberOf(layer.image), layer.x, layer.y]).join(","));
  }
  words.set("routing", routing);
  words.set("iteration", explorer.iteration + 1);
  if (explorer.pinned) words.set("class", explorer.parent);
  if (explorer.child !== null) words.set("child", explorer.child);
  const { offsets } = explorer;
  if (offsets.some((offset) => offset !== 0)) words.set("pose", offsets.join(","));
  return words.toString();
}

/** Show what an address says; what it says wrongly is left out. */
function restore(text) {
  const words = new URLSearchParams(text);
  const whole = (name, most) => {
    const number = Number.parseInt(words.get(name), 10);
    return number >= 0 && number <= most ? number : null;
  };
  const imageOf = (word) => (word === "drawing" ? null : gallery.byNumber.get(Number(word)) ?? 0);
  state.drawing = Drawing.fromText(words.get("drawing") ?? "");
  state.image = imageOf(words.get("show"));
  if (data.routings.includes(words.get("routing"))) state.routing = words.get("routing");
  document.querySelector(`[name=routing][value=${state.routing}]`).checked = true;
  explorer.iteration = (whole("iteration", data.rounds) || data.config.iterations) - 1;
  const two = (words.get("two") ?? "").split(",");
  state.layers = two.length === 6 && data.labelsPerImage === 1 ? [0, 3].map((at) => ({
    image: imageOf(two[at]),
    x: clamp(Math.round(two[at + 1]) || 0, -LARGEST_SHIFT, LARGEST_SHIFT),
    y: clamp(Math.round(two[at + 2]) || 0, -LARGEST_SHIFT, LARGEST_SHIFT),
  })) : [];
  setMode(state.layers.length ? "two" : "one");
  update();
  const parent = whole("class", data.classes.length - 1);
  if (parent !== null) explorer.chooseParent(parent);
  const child = whole("child", explorer.childCount - 1);
  if (child !== null) explorer.chooseChild(child);
  (words.get("pose") ?? "").split(",").slice(0, dim).forEach((offset, dimension) => {
    const moved = clamp(Number(offset) || 0, -LARGEST_OFFSET, LARGEST_OFFSET);
    if (moved && explorer.sliders) explorer.moveBy(dimension, moved);
  });
}

// start

buildGallery();
byId("mode").hidden = data.labelsPerImage !== 1; // its images show several classes anyway
byId("clear").addEventListener("click", clear);
byId("undo").addEventListener("click", undo);
byId("overlay").addEventListener("change", showSheet);
for (const input of document.getElementsByName("mode")) {
  input.addEventListener("change", () => chooseMode(input.value));
}
for (const input of document.getElementsByName("layer")) {
  input.addEventListener("change", () => (state.layer = +input.value));
}
for (const input of document.getElementsByName("routing")) {
  input.addEventListener("change", () => {
    state.routing = input.value;
    update({ keep: true });
  });
}
addEventListener("hashchange", () => restore(location.hash.slice(1)));
restore(location.hash.slice(1));
globalThis.graphcaps = { net, state, explorer, update, judge, told }; // for who opens the console
document.documentElement.dataset.ready = "";
