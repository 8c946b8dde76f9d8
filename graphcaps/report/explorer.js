// Drawings of the page's records that follow what the reader picks.

const records = JSON.parse(document.getElementById("records").textContent);
const { classes, children, field } = records;
const { channels, height, width } = records.image;
const byId = (id) => document.getElementById(id);

// numbers

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** IEEE 754 half precision: 1 bit of sign, 5 of exponent, 10 of fraction. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction) : sign * 2 ** -14 * fraction;
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

function halves(base64) {
  return Float32Array.from(new Uint16Array(bytes(base64).buffer), (bits) => HALVES[bits]);
}

const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);
const smallest = (numbers) => numbers.reduce((a, b) => Math.min(a, b), Infinity);
const range = (count) => Array.from({ length: count }, (_, number) => number);

/** The range of numbers as a scale: 0 at the smallest, 1 at the largest, 0.5 if all are equal. */
function scaleOf(numbers) {
  const [low, high] = [smallest(numbers), largest(numbers)];
  const scale = (x) => (high > low ? (x - low) / (high - low) : 0.5);
  return Object.assign(scale, { low, high });
}

// the decoder: as torch's, in the page

const decoder = records.decoder.map(({ rows, weight, bias }) => {
  const matrix = halves(weight);
  return { rows, columns: matrix.length / rows, weight: matrix, bias: halves(bias) };
});

/** weight · input + bias; only the inputs from `first` up to `last` are not zero. */
function linear({ rows, columns, weight, bias }, input, first = 0, last = columns) {
  return Float32Array.from({ length: rows }, (_, row) => {
    let sum = bias[row];
    for (let k = first; k < last; k++) sum += weight[row * columns + k] * input[k - first];
    return sum;
  });
}

/** The image, 0 to 255, that the decoder draws from one class capsule; all others are masked. */
function decode(pose, parent) {
  let layer = linear(decoder[0], pose, parent * pose.length, (parent + 1) * pose.length);
  for (const next of decoder.slice(1)) {
    layer = linear(next, layer.map((x) => Math.max(0, x)));
  }
  return layer.map((x) => 255 / (1 + Math.exp(-x)));
}

// what is picked

const examples = records.examples.map((example) => ({
  ...example,
  image: bytes(example.image),
  coupling: halves(example.coupling),
}));
const rounds = examples[0].lengths.length;
const poseLength = examples[0].poses[0][0].length;
const positions = children.rows * children.columns;
const childCount = children.maps * positions;
const state = { example: examples[0], iteration: rounds - 1, parent: 0, offsets: [] };

const coupling = (child) =>
  state.example.coupling[(state.iteration * childCount + child) * classes.length + state.parent];

function pick(example) {
  state.example = example;
  state.parent = example.main;
  // one scale for all iterations of an image, so that stepping shows what changes
  example.scales ??= {
    coupling: Math.max(largest(example.coupling), 2 / classes.length),
    maps: scaleOf(example.mapCoupling.flat(2)),
    votes: scaleOf(example.votes.flat(2)),
  };
  reset();
}

function reset() {
  state.offsets = Array(poseLength).fill(0);
  show();
}

function pickIteration(number) {
  state.iteration = Math.min(Math.max(number, 0), rounds - 1);
  show();
}

function pickParent(parent) {
  state.parent = parent;
  reset();
}

function show() {
  showPicks();
  showInput();
  showCoupling();
  showLengths();
  if (decoder.length) showReconstruction();
}

// elements

function make(parent, name, attributes = {}, text = "") {
  const svg = parent instanceof SVGElement;
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  set(element, attributes);
  element.textContent = text;
  return parent.appendChild(element);
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

/** Draw pixels from 0 to 255: grey ones dark on white, colours as they are. */
function paint(canvas, pixels) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  const area = height * width;
  for (let at = 0; at < area; at++) {
    for (let colour = 0; colour < 3; colour++) {
      const value = channels === 3 ? pixels[colour * area + at] : 255 - pixels[at];
      image.data[4 * at + colour] = Math.round(value);
    }
    image.data[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// pictures to pick from

const namesOf = (numbers) => numbers.map((k) => classes[k]).join(" + ") || "none";
const sorted = (numbers) => [...numbers].sort((a, b) => a - b);
const same = (some, others) => `${sorted(some)}` === `${sorted(others)}`;
const isRight = (example) => same(example.labels, example.predicted);

/** The classes that lengths tell: of so many longest capsules, or of all beyond 0.5. */
function predict(lengths) {
  const order = range(lengths.length).sort((a, b) => lengths[b] - lengths[a]);
  const { labelsPerImage } = records;
  return labelsPerImage ? order.slice(0, labelsPerImage) : order.filter((k) => lengths[k] > 0.5);
}

function describe(example) {
  const verdict = isRight(example)
    ? "classified correctly"
    : `misclassified as ${namesOf(example.predicted)}`;
  return `Test image ${example.number}, ${namesOf(example.labels)}, ${verdict}`;
}

function buildPicks() {
  examples.forEach((example, number) => {
    const right = isRight(example);
    const label = make(byId(right ? "right" : "wrong"), "label", {
      class: right ? "pick" : "pick wrong",
    });
    const input = make(label, "input", {
      type: "radio",
      name: "example",
      value: number,
      "aria-label": describe(example),
    });
    const face = make(label, "span", { class: "face" });
    paint(make(face, "canvas", { role: "img", "aria-label": describe(example) }), example.image);
    const [truth, predicted] = [namesOf(example.labels), namesOf(example.predicted)];
    make(face, "span", { class: "name" }, right ? truth : `✗ ${truth} → ${predicted}`);
    input.addEventListener("change", () => pick(example));
    example.input = input;
  });
  byId("wrong-picks").hidden = examples.every(isRight);
}

function showPicks() {
  const { example, iteration } = state;
  example.input.checked = true;
  set(byId("iteration"), { max: rounds, "aria-valuetext": `${iteration + 1} of ${rounds}` });
  byId("iteration").value = iteration + 1;
  byId("iteration").disabled = rounds === 1;
  byId("iteration-number").textContent = `${iteration + 1} of ${rounds}`;
  byId("previous").disabled = iteration === 0;
  byId("next").disabled = iteration === rounds - 1;
  const lengths = example.lengths[iteration];
  const predicted = predict(lengths);
  const verdict = same(predicted, example.labels) ? "right" : "wrong ✗";
  const [capsules, their] = predicted.length > 1
    ? ["longest capsules are", predicted.map((k) => lengths[k].toFixed(2)).join(", ")]
    : ["longest capsule is", largest(lengths).toFixed(2)];
  byId("said").textContent =
    `Test image ${example.number}, true class ${namesOf(example.labels)}. ` +
    `Iteration ${iteration + 1}: the ${capsules} ${namesOf(predicted)}, ` +
    `|v| = ${their}: ${verdict}.`;
}

// the votes over the image

const LARGEST_CIRCLE = 0.95; // pixels of the image; neighbours stand `field.step` apart

/** Row and column, in pixels, where the receptive field of a position starts. */
function fieldOf(position) {
  const [row, column] = [Math.floor(position / children.columns), position % children.columns];
  return [row * field.step + field.start, column * field.step + field.start];
}

function showInput() {
  const { example, iteration, parent } = state;
  paint(byId("input"), example.image);
  set(byId("input"), { "aria-label": describe(example) });
  const votes = example.votes[iteration][parent];
  const scale = example.scales.votes;
  const svg = byId("votes");
  set(svg, { viewBox: `0 0 ${width} ${height}` });
  svg.replaceChildren();
  const strongest = votes.indexOf(largest(votes));
  const [row, column] = fieldOf(strongest);
  votes.forEach((vote, position) => {
    const [r, c] = fieldOf(position);
    make(svg, "circle", {
      cx: c + field.side / 2,
      cy: r + field.side / 2,
      r: LARGEST_CIRCLE * Math.sqrt(0.03 + 0.97 * scale(vote)), // the area grows with the vote
      "data-vote": vote,
    });
  });
  make(svg, "rect", {
    class: "field",
    x: column,
    y: row,
    width: field.side,
    height: field.side,
  });
  const sees =
    `rows ${row} to ${row + field.side - 1}, columns ${column} to ${column + field.side - 1}`;
  set(svg, {
    "aria-label":
      `Votes for ${classes[parent]} by position, from ${smallest(votes).toFixed(2)} to ` +
      `${largest(votes).toFixed(2)}; the strongest position sees ${sees}.`,
  });
  byId("votes-caption").textContent =
    `Circles: Σ c|u| for ${classes[parent]} over the children of all ${children.maps} maps at ` +
    `a position, from ${scale.low.toFixed(2)} (dot) to ${scale.high.toFixed(2)}. Each lies at ` +
    `the middle of the ${field.side} × ${field.side} pixels that these children see; dashed: ` +
    "what the strongest see.";
}

// the coupling graph

const GRAPH = { classes: 62, top: 280, gap: 4, smallestBlock: 30, largestBlock: 78 };
let graph = {};

/** Where maps and classes stand in a drawing of this width; maps in rows, if they are many. */
function layOut(width) {
  const rows = Math.ceil((children.maps * (GRAPH.smallestBlock + GRAPH.gap)) / width);
  const inRow = Math.ceil(children.maps / rows);
  const step = width / inRow;
  const block = Math.min(GRAPH.largestBlock, step - GRAPH.gap);
  return {
    width,
    block,
    cell: block / Math.max(children.rows, children.columns),
    height: GRAPH.top + rows * (block + GRAPH.gap) + 24,
    blockX: (map) => ((map % inRow) + 0.5) * step - block / 2,
    blockY: (map) => GRAPH.top + Math.floor(map / inRow) * (block + GRAPH.gap),
    classX: (parent) => (parent + 0.5) * (width / classes.length),
    largestRadius: Math.min(22, width / classes.length / 2 - 1),
    crowded: width / classes.length < 24, // then the chosen class alone has its name
  };
}

function buildCoupling() {
  const svg = byId("coupling");
  const at = layOut(svg.clientWidth);
  svg.replaceChildren();
  set(svg, { viewBox: `0 0 ${at.width} ${at.height}`, height: at.height });
  const lines = make(svg, "g");
  const edges = range(children.maps).map((map) =>
    range(classes.length).map((parent) =>
      make(lines, "line", {
        "data-map": map,
        "data-parent": parent,
        x1: at.blockX(map) + at.block / 2,
        y1: at.blockY(map),
        x2: at.classX(parent),
        y2: GRAPH.classes,
      }),
    ),
  );
  const cells = range(childCount).map((child) => {
    const [x, y] = cellCorner(at, child);
    return make(svg, "rect", { class: "cell", x, y, width: at.cell, height: at.cell });
  });
  range(children.maps).forEach((map) =>
    make(svg, "rect", {
      class: "block",
      x: at.blockX(map),
      y: at.blockY(map),
      width: at.block,
      height: at.block,
    }),
  );
  const strong = range(examples[0].strongest[0][0].length).map(() => ({
    line: make(svg, "line", { class: "strong" }),
    mark: make(svg, "rect", { class: "mark", width: at.cell, height: at.cell }),
  }));
  const short = classes.every((name) => name.length < 4);
  const nodes = classes.map((name, parent) => ({
    circle: make(svg, "circle", { cx: at.classX(parent), cy: GRAPH.classes }),
    name: make(svg, "text", { x: at.classX(parent), y: 24 }, short ? name : parent),
  }));
  const maps = `${children.maps} capsule maps of ${children.rows} × ${children.columns} children`;
  make(svg, "text", { class: "quiet", x: at.width / 2, y: at.height - 6 }, maps);
  graph = { at, lines, edges, cells, strong, nodes };
}

function cellCorner(at, child) {
  const [map, position] = [Math.floor(child / positions), child % positions];
  const [row, column] = [Math.floor(position / children.columns), position % children.columns];
  return [at.blockX(map) + column * at.cell, at.blockY(map) + row * at.cell];
}

/** White to dark blue, in even steps of lightness. */
function shade(share) {
  return `hsl(212 ${40 + 40 * share}% ${97 - 79 * share}%)`;
}

function showCoupling() {
  const { example, iteration, parent } = state;
  const { at, lines, edges, cells, strong, nodes } = graph;
  const scale = example.scales.maps;
  const means = example.mapCoupling[iteration];
  edges.forEach((ofMap, map) =>
    ofMap.forEach((edge, j) => {
      const chosen = j === parent;
      set(edge, {
        class: chosen ? "edge chosen" : "edge",
        "stroke-width": 0.3 + (chosen ? 5 : 1.2) * scale(means[map][j]),
        "data-coupling": means[map][j],
      });
    }),
  );
  lines.append(...edges.map((ofMap) => ofMap[parent])); // the last lie over the others
  cells.forEach((cell, child) =>
    set(cell, { fill: shade(Math.min(1, coupling(child) / example.scales.coupling)) }),
  );
  strong.forEach(({ line, mark }, rank) => {
    const [x, y] = cellCorner(at, example.strongest[iteration][parent][rank]);
    set(mark, { x, y });
    set(line, {
      x1: x + at.cell / 2,
      y1: y,
      x2: at.classX(parent),
      y2: GRAPH.classes,
    });
  });
  nodes.forEach(({ circle, name }, j) => {
    const chosen = j === parent;
    set(circle, {
      class: chosen ? "class chosen" : "class",
      r: Math.max(2, at.largestRadius * Math.sqrt(example.lengths[iteration][j])),
    });
    set(name, { class: chosen ? "chosen-name" : at.crowded ? "left-out" : "" });
  });
  const ofChosen = means.map((ofMap) => ofMap[parent].toFixed(3));
  set(byId("coupling"), {
    "aria-label":
      `Iteration ${iteration + 1}: mean coupling of the capsule maps to ` +
      `${classes[parent]}: ${ofChosen.join(", ")}.`,
  });
  byId("coupling-caption").textContent =
    `Lines: mean c of a map to a class, from ${scale.low.toFixed(3)} (thin) to ` +
    `${scale.high.toFixed(3)} (thick); equal coupling is ${(1 / classes.length).toFixed(3)}. ` +
    `Squares: c of each child to ${classes[parent]}, from 0 (white) to ` +
    `${example.scales.coupling.toFixed(2)} (dark). Dashed: the ${strong.length} children with ` +
    "the largest c|u|. Circles: classes, their area is |v|.";
}

// the lengths

let bars = [];

function buildLengths() {
  bars = classes.map((name, parent) => {
    const row = make(byId("lengths"), "label", { class: "length" });
    const input = make(row, "input", { type: "radio", name: "parent", value: parent });
    const text = classes.every((other) => other.length < 4) ? name : `${parent} ${name}`;
    make(row, "span", { class: "name" }, text);
    const bar = make(make(row, "span", { class: "bar" }), "span");
    const number = make(row, "output");
    input.addEventListener("change", () => pickParent(parent));
    return { row, input, bar, number };
  });
}

function showLengths() {
  const { example, iteration, parent } = state;
  bars.forEach(({ row, input, bar, number }, j) => {
    const length = example.lengths[iteration][j];
    row.classList.toggle("chosen", j === parent);
    row.classList.toggle("true", example.labels.includes(j));
    input.checked = j === parent;
    const truly = example.labels.includes(j) ? ", the true class" : "";
    set(input, { "aria-label": `${classes[j]}, length ${length.toFixed(3)}${truly}` });
    bar.style.width = `${100 * length}%`;
    number.textContent = length.toFixed(3);
  });
  byId("entropy").replaceChildren();
  example.entropy.forEach((entropy, r) => {
    const item = make(byId("entropy"), "li", r === iteration ? { "aria-current": "step" } : {});
    item.textContent = entropy.toFixed(4);
  });
  byId("entropy-caption").textContent =
    `By iteration. Equal coupling has ln ${classes.length} = ` +
    `${records.largestEntropy.toFixed(4)}, the maximum.`;
}

// the reconstruction

const LARGEST_OFFSET = 0.25; // figure 4 of the paper
let sliders = [];
let small = [];

const signed = (x, digits) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(digits)}`;

function buildSliders() {
  sliders = range(poseLength).map((dimension) => {
    const row = make(byId("sliders"), "label", { class: "slider" });
    make(row, "span", {}, dimension + 1);
    const input = make(row, "input", {
      type: "range",
      min: -LARGEST_OFFSET,
      max: LARGEST_OFFSET,
      step: 0.01,
      "aria-label": `Dimension ${dimension + 1} of the pose`,
    });
    const number = make(row, "output");
    input.addEventListener("input", () => {
      state.offsets[dimension] = Number(input.value);
      showReconstruction();
    });
    return { input, number };
  });
  small = range(rounds).map((iteration) => {
    const box = make(byId("by-iteration"), "div");
    const canvas = make(box, "canvas", { role: "img" });
    make(box, "div", {}, rounds === 1 ? "" : `iteration ${iteration + 1}`);
    return { box, canvas };
  });
}

function moved(iteration) {
  const pose = state.example.poses[iteration][state.parent];
  return pose.map((x, dimension) => x + state.offsets[dimension]);
}

function showReconstruction() {
  const { example, iteration, parent, offsets } = state;
  const image = decode(moved(iteration), parent);
  paint(byId("reconstruction"), image);
  const difference = image.reduce((sum, x, at) => sum + Math.abs(x - example.image[at]), 0);
  const mean = (difference / image.length).toFixed(1);
  const changed = offsets.filter((offset) => offset !== 0).length;
  const dimensions = changed === 1 ? "1 dimension" : `${changed} dimensions`;
  const from = `Drawn from ${classes[parent]} after iteration ${iteration + 1}`;
  const text = `${from}${changed ? `, ${dimensions} moved` : ""}; ` +
    `on average ${mean} of 255 grey levels from the input.`;
  set(byId("reconstruction"), { "aria-label": text });
  byId("reconstruction-caption").textContent = text;
  small.forEach(({ box, canvas }, r) => {
    paint(canvas, decode(moved(r), parent));
    box.classList.toggle("shown", r === iteration);
    set(canvas, { "aria-label": `Reconstruction after iteration ${r + 1}` });
  });
  sliders.forEach(({ input, number }, dimension) => {
    const [pose, offset] = [example.poses[iteration][parent][dimension], offsets[dimension]];
    input.value = offset;
    number.textContent = `${signed(pose, 2)} ${signed(offset, 2)}`;
    set(input, { "aria-valuetext": `${signed(pose + offset, 2)}, moved by ${signed(offset, 2)}` });
  });
}

// start

function start() {
  buildPicks();
  buildCoupling();
  buildLengths();
  if (decoder.length) buildSliders();
  byId("decoding").hidden = !decoder.length;
  byId("no-decoder").hidden = decoder.length > 0;
  byId("reset").addEventListener("click", reset);
  byId("iteration").addEventListener("input", (event) => pickIteration(event.target.value - 1));
  byId("previous").addEventListener("click", () => pickIteration(state.iteration - 1));
  byId("next").addEventListener("click", () => pickIteration(state.iteration + 1));
  addEventListener("resize", () => {
    buildCoupling();
    showCoupling();
  });
  const noFigure = !document.querySelector(".plate");
  byId("figures").hidden = byId("to-figures").hidden = noFigure;
  pick(examples[0]);
}

start();
