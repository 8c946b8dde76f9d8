// Strokes of a pen on a sheet of 280 × 280 units, and the image of them that a net sees.

const SHEET = 280;
const PEN = 22; // width, in units
const DIGITS_SHARE = 20 / 28; // of an image's side that MNIST's digits fill
const LARGEST_GROWTH = 2; // a small drawing is enlarged no more than this
const FINER = 4; // pixels on each side of which one of the image is the mean
const LEAST_MOVE = 3; // units between two points of a stroke
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/** A smooth line through points [x, y]. */
function trace(context, points) {
  context.beginPath();
  context.moveTo(...points[0]);
  for (let n = 1; n < points.length - 1; n++) {
    const [[x, y], [nextX, nextY]] = [points[n], points[n + 1]];
    context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
  }
  context.lineTo(...points.at(-1)); // a single point becomes a dot
  context.stroke();
}

class Drawing {
  constructor(strokes = []) {
    this.strokes = strokes;
    this.fine = document.createElement("canvas");
  }

  get empty() {
    return !this.strokes.length;
  }

  start(x, y) {
    this.strokes.push([this.onSheet(x, y)]);
  }

  /** Go on with the last stroke; false where the pen has hardly moved. */
  extend(x, y) {
    const stroke = this.strokes.at(-1);
    const [from, to] = [stroke.at(-1), this.onSheet(x, y)];
    if (Math.hypot(to[0] - from[0], to[1] - from[1]) < LEAST_MOVE) return false;
    stroke.push(to);
    return true;
  }

  onSheet(x, y) {
    return [x, y].map((place) => clamp(Math.round(place), 0, SHEET - 1));
  }

  paintOn(context, width = PEN) {
    Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round" });
    for (const stroke of this.strokes) trace(context, stroke);
  }

  /**
   * The drawing as MNIST has its digits: the longer side of what is drawn fills 20 of 28 pixels,
   * the centre of mass is in the middle. Of an `item` it fills the image, and its own centre is in
   * the middle. The pen is as wide for a small drawing as for a large one.
   *
   * Returns pixels from 0 to 1, [size, size], and where on the sheet they lie: left, top and side.
   */
  image(size, kind) {
    if (this.empty) return { pixels: new Float32Array(size * size), left: 0, top: 0, side: SHEET };
    const points = this.strokes.flat();
    const [low, high] = [Math.min, Math.max].map((extreme) => {
      return [0, 1].map((axis) => extreme(...points.map((point) => point[axis])));
    });
    const longer = Math.max(high[0] - low[0], high[1] - low[1]) + PEN;
    const share = kind === "item" ? 1 : DIGITS_SHARE;
    const side = Math.max(longer / share, SHEET / LARGEST_GROWTH);
    const middle = [0, 1].map((axis) => (low[axis] + high[axis]) / 2);
    const count = size * FINER;
    const ink = this.rendered(middle, side, count);
    const moved = kind === "item"
      ? [0, 0]
      : centreOfMass(ink, count).map((place) => Math.round(place - count / 2));
    return {
      pixels: reduced(ink, count, moved),
      left: middle[0] - side / 2 + (moved[0] / count) * side,
      top: middle[1] - side / 2 + (moved[1] / count) * side,
      side,
    };
  }

  /** Ink from 0 to 255 of a square of the sheet, [count, count]. */
  rendered(middle, side, count) {
    this.fine.width = this.fine.height = count;
    const context = this.fine.getContext("2d", { willReadFrequently: true });
    const scale = count / side;
    context.setTransform(
      scale, 0, 0, scale, count / 2 - scale * middle[0], count / 2 - scale * middle[1],
    );
    this.paintOn(context, (PEN * side) / SHEET);
    const { data } = context.getImageData(0, 0, count, count);
    const ink = new Uint8Array(count * count);
    for (let at = 0; at < ink.length; at++) ink[at] = data[4 * at + 3];
    return ink;
  }

  /** For the address of the page: three letters for each point, a dot between strokes. */
  toText() {
    const letters = ([x, y]) => {
      const bits = x * 512 + y;
      return [12, 6, 0].map((shift) => LETTERS[(bits >> shift) & 63]).join("");
    };
    return this.strokes.map((stroke) => stroke.map(letters).join("")).join(".");
  }

  static fromText(text) {
    const strokes = text.split(".").map((stroke) =>
      (stroke.match(/[\w-]{3}/g) ?? []).map((point) => {
        const bits = [...point].reduce((all, letter) => all * 64 + LETTERS.indexOf(letter), 0);
        return [Math.min(bits >> 9, SHEET - 1), Math.min(bits & 511, SHEET - 1)];
      }),
    );
    return new Drawing(strokes.filter((stroke) => stroke.length));
  }
}

/** Of ink [count, count], across and down. */
function centreOfMass(ink, count) {
  let mass = 0, across = 0, down = 0;
  for (let y = 0, at = 0; y < count; y++) {
    for (let x = 0; x < count; x++, at++) {
      mass += ink[at];
      across += ink[at] * (x + 0.5);
      down += ink[at] * (y + 0.5);
    }
  }
  return [across / (mass || 1), down / (mass || 1)];
}

/** Means of FINER × FINER pixels of ink that was moved by whole pixels, in steps of 1/255. */
function reduced(ink, count, [right, down]) {
  const size = count / FINER;
  const totals = new Float32Array(size * size);
  for (let y = Math.max(0, -down); y < Math.min(count, count - down); y++) {
    const line = Math.floor(y / FINER) * size;
    const from = (y + down) * count + right;
    for (let x = Math.max(0, -right); x < Math.min(count, count - right); x++) {
      totals[line + Math.floor(x / FINER)] += ink[from + x];
    }
  }
  return totals.map((total) => Math.round(total / FINER ** 2) / 255);
}
