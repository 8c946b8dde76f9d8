// The explorer: what routing made of one image, drawn so that every part can be pointed at.
//
// It draws a `look`: { title, image [C, H, W] from 0 to 1, truth (classes, or null), rounds, dim },
// and `predicted`, the class to begin with, if it is not the longest of the shown iteration.
// A round is an iteration of the routing: { c [I, J], lengths [J], pose(j), amounts(j) [I] }, and
// of a live net agreement(i, j) and what routings.js gives, too. `amounts` says how much each child
// gives to a class.

const LARGEST_OFFSET = 0.25; // figure 4 of the paper
const LARGEST_CIRCLE = 0.475; // of the distance of neighbours
const SAID_AFTER = 400; // milliseconds without a change
const STEP_OF_PLAY = 800; // milliseconds
const CARRIED = 0.85; // of |s_j|: how few children carry so much of it is said

class Explorer {
  /**
   * Of a page that knows classes, names of them; labelsPerImage, how many an image shows (0: any
   * number); hasVerdict, whether thresholds hold; image: { channels, height, width }; children:
   * { maps, rows, columns }; field: { side, step, start } in pixels; decoder, its layers; rounds,
   * how many iterations there are; routing(), the name of the one that is shown, whose entry in
   * equations.js says what amounts are; thresholds, of verdicts. `changed` is called when
   * something else is chosen.
   */
  constructor(page, { changed = () => {} } = {}) {
    this.page = page;
    this.changed = changed;
    this.places = page.children.rows * page.children.columns;
    this.childCount = page.children.maps * this.places;
    this.iteration = page.rounds - 1;
    this.parent = 0;
    this.pinned = false; // the class was chosen by the reader
    this.child = null; // chosen by the reader; else the one that gives the most
    this.pointed = null; // under the pointer
    this.offsets = [];
    this.tone = page.image.channels === 1 ? "grey" : ""; // grey images are light on dark pages
    if (!this.tone) {
      document.querySelectorAll("canvas.grey").forEach((canvas) => canvas.classList.remove("grey"));
    }
    this.shortNames = page.classes.every((name) => name.length < 4);
    takeColours();
    this.buildLengths();
    this.buildCarriers();
    this.buildCoupling();
    this.buildCourses();
    this.buildControls();
    byId("drawn").hidden = byId("decoding").hidden = !page.decoder.length;
    byId("no-decoder").hidden = page.decoder.length > 0;
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
      matchMedia(query).addEventListener("change", () => {
        takeColours();
        this.draw();
        this.changed();
      });
    }
    addEventListener("resize", () => {
      this.buildCoupling();
      this.buildCourses();
      if (this.look) this.draw();
    });
  }

  // what is chosen

  /** Show another look; the class that was chosen is kept where `keep` says so. */
  show(look, { keep = false } = {}) {
    this.look = look;
    if (!keep) {
      this.pinned = false;
      this.child = null;
    }
    if (!this.pinned) this.parent = look.predicted ?? this.longest;
    if (!this.offsets.length) this.buildSliders(look.dim);
    if (!keep) this.offsets.fill(0);
    this.draw();
  }

  chooseIteration(number) {
    this.iteration = clamp(number, 0, this.page.rounds - 1);
    this.draw();
    this.changed();
  }

  chooseParent(parent) {
    this.pinned = true;
    this.parent = parent;
    this.offsets.fill(0);
    this.draw();
    this.changed();
  }

  chooseChild(child) {
    this.child = child;
    this.drawChild();
    this.changed();
  }

  point(child) {
    if (this.pointed === child) return;
    this.pointed = child;
    this.drawChild();
  }

  moveBy(dimension, offset) {
    this.offsets[dimension] = offset;
    this.drawReconstruction();
    this.changed();
  }

  get round() {
    return this.look.rounds[this.iteration];
  }

  get longest() {
    return this.round.lengths.indexOf(largest(this.round.lengths));
  }

  /** The image that the decoder draws of a class, its pose moved where it is the chosen one. */
  drawnOf(parent) {
    if (parent !== this.parent || this.offsets.every((offset) => offset === 0)) {
      return this.drawnUnmoved(parent);
    }
    const moved = Float32Array.from(this.round.pose(parent), (x, dimension) => {
      return x + this.offsets[dimension];
    });
    return decode(this.page.decoder, moved, parent);
  }

  /** The same without what the sliders add; kept, since an update asks for it more than once. */
  drawnUnmoved(parent) {
    const drawn = (this.round.drawn ??= []);
    drawn[parent] ??= decode(this.page.decoder, Float32Array.from(this.round.pose(parent)), parent);
    return drawn[parent];
  }

  nameOf(parent) {
    return this.page.classes[parent];
  }

  // all of it

  draw() {
    // one scale for all iterations, so that stepping shows what changes
    const ofRounds = this.look.rounds.map((round) => round.amounts(this.parent));
    this.amounts = ofRounds[this.iteration];
    this.total = sum(this.amounts);
    this.mostOfChild = largestSize(ofRounds);
    this.mostOfPlace = largestSize(ofRounds.map((amounts) => this.byPlace(amounts)));
    this.nameMeasure();
    this.drawControls();
    this.drawLengths();
    this.drawCarriers();
    this.drawCoupling();
    this.drawCourses();
    this.drawChild();
    if (this.page.decoder.length) this.drawReconstruction();
    this.say();
  }

  // iterations

  buildControls() {
    const { rounds } = this.page;
    set(byId("iteration"), { max: rounds });
    for (const id of ["iteration", "previous", "next", "play"]) byId(id).disabled = rounds === 1;
    byId("iteration").addEventListener("input", ({ target }) => {
      this.pause();
      this.chooseIteration(target.value - 1);
    });
    byId("previous").addEventListener("click", () => this.chooseIteration(this.iteration - 1));
    byId("next").addEventListener("click", () => this.chooseIteration(this.iteration + 1));
    byId("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    byId("reset").addEventListener("click", () => {
      this.offsets.fill(0);
      this.drawReconstruction();
      this.changed();
    });
    byId("overlay").addEventListener("change", () => this.drawReconstruction());
    for (const input of document.getElementsByName("squares")) {
      input.addEventListener("change", () => this.drawCoupling());
    }
    set(byId("child"), { max: this.childCount - 1 });
    byId("child").addEventListener("input", ({ target }) => this.chooseChild(+target.value));
  }

  /** Say what lengths and amounts are, once for a routing. */
  nameMeasure() {
    const routing = this.page.routing();
    if (this.named === routing) return;
    this.named = routing;
    this.words = equationsOf(routing);
    const { measure, sum: whole, strength, about } = this.words;
    byId("lengths-title").innerHTML = `${measure.title} ${measure.html} of the class capsules`;
    byId("courses-title").textContent = `${measure.title}, iteration by iteration`;
    byId("amount-name").textContent = whole ? `its share of ${whole}` : `coupling × ${strength}`;
    byId("about-routing").innerHTML =
      `A child <i>i</i> divides its votes among the classes <i>j</i> by the coupling ` +
      `<i>c<sub>ij</sub></i>${about} The ${measure.name} ${measure.html} says how sure the net ` +
      "is of a class.";
  }

  play() {
    byId("play").textContent = "Pause";
    if (this.iteration === this.page.rounds - 1) this.chooseIteration(0);
    this.playing = setInterval(() => {
      this.chooseIteration(this.iteration + 1);
      if (this.iteration === this.page.rounds - 1) this.pause();
    }, STEP_OF_PLAY);
  }

  pause() {
    clearInterval(this.playing);
    this.playing = null;
    byId("play").textContent = "Play";
  }

  drawControls() {
    const { iteration, page: { rounds } } = this;
    const text = `${iteration + 1} of ${rounds}`;
    byId("iteration").value = iteration + 1;
    set(byId("iteration"), { "aria-valuetext": text });
    byId("iteration-number").textContent = text;
    byId("previous").disabled = iteration === 0;
    byId("next").disabled = iteration === rounds - 1;
  }

  /** What the only live region says, once nothing has changed for a moment. */
  say() {
    const { look, longest, round, page, words: { measure } } = this;
    const predicted = predictedClasses(round.lengths, page.labelsPerImage);
    const truth = look.truth === null ? "" : `, true class ${namesOf(look.truth, page.classes)}`;
    const right = look.truth === null ? "" : `: ${same(predicted, look.truth) ? "right" : "wrong ✗"}`;
    const draw = page.decoder.length ? (parent) => this.drawnUnmoved(parent) : null;
    const words = page.hasVerdict
      ? told(judge(round.lengths, look.image, draw, page.thresholds), page.classes)
      : namesOf(predicted, page.classes);
    if (byId("verdict").textContent !== words) byId("verdict").textContent = words;
    byId("verdict").classList.toggle("words", words.length > 2);
    const text =
      `${look.title}${truth}. Iteration ${this.iteration + 1}: ${words}; ${measure.most} ` +
      `${this.nameOf(longest)}, ${measure.symbol} = ${round.lengths[longest].toFixed(2)}${right}.`;
    clearTimeout(this.toSay);
    const say = () => (byId("said").textContent = text);
    if (byId("said").textContent) this.toSay = setTimeout(say, SAID_AFTER);
    else say();
  }

  // lengths

  buildLengths() {
    this.bars = this.page.classes.map((name, parent) => {
      const row = make(byId("lengths"), "label", { class: "length" });
      const input = make(row, "input", { type: "radio", name: "parent", value: parent });
      make(row, "span", { class: "name" }, this.shortNames ? name : `${parent} ${name}`);
      const bar = make(make(row, "span", { class: "bar" }), "span");
      const number = make(row, "span", { class: "number" });
      input.addEventListener("change", () => this.chooseParent(parent));
      return { row, input, bar, number };
    });
  }

  drawLengths() {
    this.bars.forEach(({ row, input, bar, number }, j) => {
      const length = this.round.lengths[j];
      const truly = this.look.truth?.includes(j) ?? false;
      row.classList.toggle("chosen", j === this.parent);
      row.classList.toggle("true", truly);
      const { hasVerdict, thresholds } = this.page;
      row.classList.toggle("long", hasVerdict && length >= thresholds.lengthOfPresent);
      input.checked = j === this.parent;
      const name = `${this.nameOf(j)}, ${this.words.measure.name} ${length.toFixed(3)}`;
      set(input, { "aria-label": truly ? `${name}, the true class` : name });
      bar.style.transform = `scaleX(${length})`;
      number.textContent = length.toFixed(3);
    });
  }

  // who carries the class, over the image

  /** Where the receptive field of a position starts, in pixels right and down. */
  fieldOf(place) {
    const { columns } = this.page.children;
    const { step, start } = this.page.field;
    return [place % columns, Math.floor(place / columns)].map((along) => along * step + start);
  }

  buildCarriers() {
    const svg = byId("carriers");
    const { height, width } = this.page.image;
    const { side } = this.page.field;
    set(svg, { viewBox: `0 0 ${width} ${height}` });
    for (const stack of document.querySelectorAll(".stack")) {
      stack.style.aspectRatio = `${width} / ${height}`;
    }
    this.circles = range(this.places).map((place) => {
      const [cx, cy] = this.fieldOf(place).map((edge) => edge + side / 2);
      const circle = make(svg, "circle", { cx, cy });
      circle.addEventListener("pointerenter", () => this.point(this.strongestAt(place)));
      circle.addEventListener("pointerleave", () => this.point(null));
      circle.addEventListener("click", () => this.chooseChild(this.strongestAt(place)));
      return circle;
    });
    this.frame = make(svg, "rect", { class: "field", width: side, height: side });
  }

  /** Amounts summed over the maps at each position, [places]. */
  byPlace(amounts) {
    const totals = new Float32Array(this.places);
    amounts.forEach((amount, child) => (totals[child % this.places] += amount));
    return totals;
  }

  strongestAt(place) {
    const children = range(this.page.children.maps).map((map) => map * this.places + place);
    const size = (child) => Math.abs(this.amounts[child]);
    return children.reduce((a, b) => (size(b) > size(a) ? b : a));
  }

  drawCarriers() {
    const { look, page, mostOfPlace: most } = this;
    paint(byId("input"), look.image, page.image);
    set(byId("input"), { "aria-label": look.title });
    const ofPlaces = this.byPlace(this.amounts);
    this.circles.forEach((circle, place) => {
      const amount = ofPlaces[place];
      set(circle, {
        class: amount < 0 ? "against" : "for",
        // the area is the amount
        r: LARGEST_CIRCLE * page.field.step * Math.sqrt(Math.abs(amount) / most),
        "data-amount": amount,
      });
    });
    const name = this.nameOf(this.parent);
    const text = this.words.sum ? this.shareInWords(name) :
      `Circles: coupling × ${this.words.strength} for ${name}, summed over the ` +
      `${page.children.maps} maps at a position, up to ${most.toFixed(2)}.`;
    byId("carriers-title").textContent =
      this.words.sum ? this.words.title(name) : `Where votes for ${name} come from`;
    set(byId("carriers"), { "aria-label": text });
    byId("carriers-caption").textContent = text;
  }

  shareInWords(name) {
    const { amounts, total, words } = this;
    const falling = amounts.toSorted().reverse();
    let [carried, count] = [0, 0];
    while (count < falling.length && carried < CARRIED * total) carried += falling[count++];
    const against = amounts.filter((x) => x < 0);
    const few = `${count} of ${amounts.length} children ${words.carry} ` +
      `${percent(carried / total)} of ${words.sum} = ${total.toFixed(2)} for ${name}`;
    const others = `${against.length} ${words.against}, ${percent(sum(against) / total)} together`;
    return `${few}; ${others}. ` +
      `Circles: ${words.share} at the middle of what the children see; hollow: against.`;
  }

  // the graph of children and classes

  /** Where maps and classes stand in a drawing of this width; maps in rows, if they are many. */
  layOut(width) {
    const { maps, rows: ofMap, columns } = this.page.children;
    const [top, gap, smallest, most] = [250, 6, 30, 78];
    const rows = Math.ceil((maps * (smallest + gap)) / width);
    const inRow = Math.ceil(maps / rows);
    const step = width / inRow;
    const block = Math.min(most, step - gap);
    const ofClass = width / this.page.classes.length;
    return {
      width,
      block,
      cell: block / Math.max(ofMap, columns),
      height: top + rows * (block + gap) + 20,
      blockX: (map) => ((map % inRow) + 0.5) * step - block / 2,
      blockY: (map) => top + Math.floor(map / inRow) * (block + gap),
      classX: (parent) => (parent + 0.5) * ofClass,
      classY: 56,
      largestRadius: Math.min(22, ofClass / 2 - 1),
      crowded: ofClass < 24, // then the chosen class alone has its name
    };
  }

  buildCoupling() {
    const svg = byId("coupling");
    const { maps, rows, columns } = this.page.children;
    const at = this.layOut(svg.clientWidth || 640);
    svg.replaceChildren();
    set(svg, { viewBox: `0 0 ${at.width} ${at.height}`, height: at.height });
    const lines = make(svg, "g");
    const edges = range(maps).map((map) =>
      this.page.classes.map((_, parent) => make(lines, "line", {
        "data-map": map,
        "data-parent": parent,
        x1: at.blockX(map) + (columns * at.cell) / 2,
        y1: at.blockY(map),
        x2: at.classX(parent),
        y2: at.classY,
      })),
    );
    const corners = range(this.childCount).map((child) => {
      const [map, place] = [Math.floor(child / this.places), child % this.places];
      const [row, column] = [Math.floor(place / columns), place % columns];
      return [at.blockX(map) + column * at.cell, at.blockY(map) + row * at.cell];
    });
    const blocks = range(maps).map((map) => make(svg, "rect", {
      class: "block",
      x: at.blockX(map),
      y: at.blockY(map),
      width: columns * at.cell,
      height: rows * at.cell,
    }));
    // one path for all squares of a kind: a page that draws at every stroke cannot move each
    const squares = ["for", "against", "coupled"].map((kind) => {
      return make(svg, "path", { class: `cell ${kind}` });
    });
    const ray = make(svg, "line", { class: "ray" });
    const mark = make(svg, "rect", { class: "mark", width: at.cell, height: at.cell });
    const nodes = this.page.classes.map((name, parent) => {
      const node = make(svg, "g", { class: "node", "data-parent": parent });
      const circle = make(node, "circle", { cx: at.classX(parent), cy: at.classY });
      const short = this.shortNames ? name : parent;
      const text = make(node, "text", { x: at.classX(parent), y: 22 }, short);
      node.addEventListener("click", () => this.chooseParent(parent));
      return { node, circle, text };
    });
    const what = `${maps} maps of ${rows} × ${columns} children`;
    make(svg, "text", { class: "quiet", x: at.width / 2, y: at.height - 4 }, what);
    lines.addEventListener("pointerover", ({ target }) => {
      const { map, parent } = target.dataset;
      const mean = this.meanCoupling(+map, +parent).toFixed(4);
      const text = `Map ${map} to ${this.nameOf(+parent)}: mean coupling ${mean}`;
      (target.firstChild ?? make(target, "title")).textContent = text;
    });
    lines.addEventListener("click", ({ target }) => this.chooseParent(+target.dataset.parent));
    blocks.forEach((block, map) => {
      const childAt = ({ clientX, clientY }) => {
        const { left, top, width, height } = block.getBoundingClientRect();
        const row = clamp(Math.floor(((clientY - top) / height) * rows), 0, rows - 1);
        const column = clamp(Math.floor(((clientX - left) / width) * columns), 0, columns - 1);
        return map * this.places + row * columns + column;
      };
      block.addEventListener("pointermove", (event) => this.point(childAt(event)));
      block.addEventListener("pointerleave", () => this.point(null));
      block.addEventListener("click", (event) => this.chooseChild(childAt(event)));
    });
    this.graph = { at, lines, edges, squares, corners, ray, mark, nodes };
  }

  meanCoupling(map, parent) {
    const { c, lengths } = this.round;
    let total = 0;
    for (let place = 0; place < this.places; place++) {
      total += c[(map * this.places + place) * lengths.length + parent];
    }
    return total / this.places;
  }

  drawCoupling() {
    const { at, lines, edges, squares, corners, nodes } = this.graph;
    const { parent, round, amounts, page } = this;
    const parents = page.classes.length;
    edges.forEach((ofMap, map) => ofMap.forEach((edge, j) => {
      const width = widthOf(this.meanCoupling(map, j), parents, j === parent);
      set(edge, { class: j === parent ? "edge chosen" : "edge", "stroke-width": width });
    }));
    if (lines.lastChild !== edges.at(-1)[parent]) {
      lines.append(...edges.map((ofMap) => ofMap[parent])); // the last lie over the others
    }
    const showCoupling = document.querySelector("[name=squares]:checked").value === "coupling";
    const scale = showCoupling
      ? Math.max(largest(this.look.rounds.map(({ c }) => largest(c))), 2 / parents)
      : this.mostOfChild;
    const paths = ["", "", ""];
    for (let child = 0; child < this.childCount; child++) {
      const x = showCoupling ? round.c[child * parents + parent] : amounts[child];
      const side = (at.cell - 1) * Math.sqrt(Math.abs(x) / scale); // the area is the number
      const gap = (at.cell - side) / 2;
      const [left, top] = [corners[child][0] + gap, corners[child][1] + gap];
      const kind = showCoupling ? 2 : x < 0 ? 1 : 0;
      const long = side.toFixed(2);
      paths[kind] += `M${left.toFixed(2)} ${top.toFixed(2)}h${long}v${long}h-${long}z`;
    }
    squares.forEach((path, kind) => set(path, { d: paths[kind] }));
    nodes.forEach(({ node, circle, text }, j) => {
      node.classList.toggle("chosen", j === parent);
      set(circle, { r: Math.max(2, at.largestRadius * Math.sqrt(round.lengths[j])) });
      text.classList.toggle("left-out", at.crowded && j !== parent);
    });
    const name = this.nameOf(parent);
    const means = range(page.children.maps).map((map) => this.meanCoupling(map, parent).toFixed(3));
    set(byId("coupling"), {
      "aria-label": `Mean coupling of the capsule maps to ${name}: ${means.join(", ")}.`,
    });
    const { strength, share = `c × ${strength}`, measure } = this.words;
    const what = showCoupling ? "c" : share;
    byId("coupling-caption").textContent =
      "Lines are as thick as the mean coupling of a map to a class; equal coupling is " +
      `${(1 / parents).toFixed(2)}. Circles are classes, their area is ${measure.symbol}. The area ` +
      `of a square is ${what}; a full one is ${+scale.toPrecision(2)}` +
      `${showCoupling ? "" : ", a hollow one is below zero"}. ` +
      this.entropyInWords();
  }

  /** The mean entropy of the children's coupling, beside that of equal coupling. */
  entropyInWords() {
    const { c, lengths } = this.round;
    const parents = lengths.length;
    let total = 0;
    for (const x of c) total -= x > 0 ? x * Math.log(x) : 0;
    const mean = (total / this.childCount).toFixed(3);
    return `Mean entropy of c: ${mean} nats, of at most ln ${parents} = ` +
      `${Math.log(parents).toFixed(3)}.`;
  }

  // one edge

  drawChild() {
    const { look, parent, graph: { at, corners, ray, mark }, page } = this;
    if (!look) return;
    const child = this.pointed ?? this.child ?? this.strongestChild();
    const { columns } = page.children;
    const place = child % this.places;
    const [left, top] = this.fieldOf(place);
    set(this.frame, { x: left, y: top });
    const [x, y] = corners[child];
    set(mark, { x, y });
    set(ray, { x1: x + at.cell / 2, y1: y, x2: at.classX(parent), y2: at.classY });
    if (this.pointed === null) byId("child").value = child;
    const where = `map ${Math.floor(child / this.places)}, row ${Math.floor(place / columns)}, ` +
      `column ${place % columns}`;
    byId("child-number").textContent = child;
    set(byId("child"), { "aria-valuetext": `${child}, ${where}` });
    this.drawFormulas(this.formulas(child));
  }

  drawFormulas(formulas) {
    const list = byId("formulas");
    const lefts = formulas.map(([left]) => left).join();
    if (this.lefts !== lefts) {
      this.lefts = lefts;
      list.innerHTML = formulas
        .map(([left]) => `<dt>${left}</dt><dd class="number"></dd><dd class="note"></dd>`)
        .map((row) => `<div>${row}</div>`)
        .join("");
    }
    formulas.forEach(([, number, note], row) => {
      const [, second, third] = list.children[row].children;
      second.textContent = number;
      third.textContent = note;
    });
  }

  strongestChild() {
    return this.amounts.indexOf(largest(this.amounts));
  }

  /** Left side in HTML, number and note of each equation of the step. */
  formulas(child) {
    const { round, parent, iteration, total, words } = this;
    const parents = this.page.classes.length;
    const edge = child * parents + parent;
    const amount = this.amounts[child];
    return words.of({ round, child, parent, edge, iteration, parents, amount, total })
      .filter(([, number]) => number !== undefined)
      .map(([left, number, write, note]) => [left, write(number), note]);
  }

  // lengths by iteration

  buildCourses() {
    const svg = byId("courses");
    const [width, height] = [svg.clientWidth || 480, 230];
    const { rounds, classes } = this.page;
    const [left, right, top, bottom] = [30, 34, 8, 26];
    const x = (r) => left + (rounds === 1 ? 0.5 : r / (rounds - 1)) * (width - left - right);
    const y = (length) => top + (1 - length) * (height - top - bottom);
    svg.replaceChildren();
    set(svg, { viewBox: `0 0 ${width} ${height}`, height });
    for (const length of [0, 0.5, 1]) {
      const [y1, y2] = [y(length), y(length)];
      make(svg, "line", { class: "rule", x1: left, x2: width - right, y1, y2 });
      const place = { x: left - 6, y: y1 + 4, "text-anchor": "end" };
      make(svg, "text", { class: "quiet", ...place }, length);
    }
    range(rounds).forEach((r) => {
      make(svg, "text", { class: "quiet", x: x(r), y: height - 6, "text-anchor": "middle" }, r + 1);
    });
    const now = make(svg, "line", { class: "now", y1: y(0), y2: y(1) });
    const courses = classes.map(() => make(svg, "polyline", { class: "course" }));
    const end = make(svg, "text", { class: "chosen-name", x: width - right + 8 });
    svg.onclick = ({ offsetX }) => {
      const nearest = rounds === 1 ? 0 : ((offsetX - left) / (width - left - right)) * (rounds - 1);
      this.chooseIteration(Math.round(nearest));
    };
    this.chart = { svg, x, y, now, courses, end };
  }

  drawCourses() {
    const { look, parent, chart: { svg, x, y, now, courses, end } } = this;
    set(now, { x1: x(this.iteration), x2: x(this.iteration) });
    courses.forEach((course, j) => {
      const points = look.rounds.map(({ lengths }, r) => `${x(r)},${y(lengths[j]).toFixed(1)}`);
      if (points.length === 1) points.push(`${x(0) + 1},${points[0].split(",")[1]}`);
      set(course, { points: points.join(" "), class: j === parent ? "course chosen" : "course" });
    });
    if (svg.lastChild !== courses[parent]) svg.append(courses[parent]);
    const last = look.rounds.at(-1).lengths[parent];
    set(end, { y: y(last) + 5 });
    end.textContent = this.shortNames ? this.nameOf(parent) : parent;
    const ofParent = look.rounds.map(({ lengths }) => lengths[parent].toFixed(2)).join(", ");
    const { name } = this.words.measure;
    const text = `The ${name} of ${this.nameOf(parent)} by iteration: ${ofParent}.`;
    set(svg, { "aria-label": text });
    byId("courses-caption").textContent = `${text} Thin: the other classes.`;
  }

  // the reconstruction and the pose

  buildSliders(dim) {
    this.offsets = Array(dim).fill(0);
    if (!this.page.decoder.length) return;
    this.sliders = range(dim).map((dimension) => {
      const row = make(byId("sliders"), "label", { class: "slider" });
      make(row, "span", {}, dimension);
      const input = make(row, "input", {
        type: "range",
        min: -LARGEST_OFFSET,
        max: LARGEST_OFFSET,
        step: 0.01,
        "aria-label": `Dimension ${dimension} of the pose`,
      });
      const number = make(row, "span", { class: "number" });
      input.addEventListener("input", () => this.moveBy(dimension, +input.value));
      return { input, number };
    });
  }

  drawReconstruction() {
    const { look, parent, offsets, page: { image: size } } = this;
    const drawn = this.drawnOf(parent);
    const difference = drawn.map((x, at) => x - look.image[at]);
    const over = byId("overlay").checked;
    byId("reconstruction").classList.toggle("grey", !over && this.tone === "grey");
    byId("over").hidden = !over;
    if (over) paint(byId("over"), look.image.map((x) => 0.35 * x), size);
    paint(byId("reconstruction"), over ? grey(drawn, size) : drawn, size, over ? colours.for : INK);
    paint(byId("pose-input"), look.image, size);
    paint(byId("pose-drawn"), drawn, size);
    paintSigned(byId("pose-difference"), grey(difference, size), size);
    const changed = offsets.filter((offset) => offset !== 0).length;
    const moved = changed ? `, ${changed} ${changed === 1 ? "dimension" : "dimensions"} moved` : "";
    const error = relativeError(look.image, drawn);
    const apart = Number.isFinite(error)
      ? `; squared error ${percent(error)} of the input's squares`
      : "";
    const text = `${this.nameOf(parent)} after iteration ${this.iteration + 1}${moved}${apart}.`;
    byId("drawn-class").textContent = this.nameOf(parent);
    byId("reconstruction-caption").textContent = text;
    set(byId("reconstruction"), { "aria-label": `Drawn: ${text}` });
    set(byId("pose-drawn"), { "aria-label": `Drawn: ${text}` });
    set(byId("pose-input"), { "aria-label": look.title });
    set(byId("pose-difference"), { "aria-label": `Reconstruction minus input; ${text}` });
    const pose = this.round.pose(parent);
    this.sliders.forEach(({ input, number }, dimension) => {
      const [x, offset] = [pose[dimension], offsets[dimension]];
      input.value = offset;
      number.textContent = `${signed(x, 2)} ${signed(offset, 2)}`;
      set(input, { "aria-valuetext": `${signed(x + offset, 2)}, moved by ${signed(offset, 2)}` });
    });
  }
}

/** The largest absolute value in some arrays. */
function largestSize(arrays) {
  return Math.max(1e-9, ...arrays.map((numbers) => largest(numbers.map(Math.abs))));
}

/** Of a line, in pixels: in proportion to the coupling, so that equal coupling looks equal. */
function widthOf(coupling, parents, chosen) {
  return clamp((chosen ? 2 : 0.7) * coupling * parents, 0.2, 8);
}
