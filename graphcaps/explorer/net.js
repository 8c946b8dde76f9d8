// A CapsNet in the browser: an image -> primary capsules -> votes -> routing -> a reconstruction.
//
// Arrays are flat, in the order that their comments give, the last axis running fastest. Symbols
// are those of graphcaps/routing/README.md: u of children i, votes û, logits b, coupling c,
// weighted sums s and class capsules v of parents j.

const OF_ROUTING = "capsules.routing.";

/** A linear layer or a convolution, from packed weights in torch's order. */
function unpack({ weight, bias, kernel = 1, groups = 1, ...others }) {
  const unpacked = halves(bias);
  const moved = channelsLast(halves(weight), unpacked.length, kernel, groups);
  return { weight: moved, bias: unpacked, kernel, ...others };
}

/**
 * From [out, in / groups, kernel, kernel], as torch has it, to [kernel, kernel, in, out], with
 * zeros from one group of channels to another.
 */
function channelsLast(weight, outputs, kernel, groups) {
  const area = kernel * kernel;
  const ofGroup = weight.length / (outputs * area);
  const inputs = ofGroup * groups;
  const moved = new Float32Array(area * inputs * outputs);
  for (let o = 0; o < outputs; o++) {
    const first = Math.floor((o * groups) / outputs) * ofGroup;
    for (let c = 0; c < ofGroup; c++) {
      for (let k = 0; k < area; k++) {
        moved[(k * inputs + first + c) * outputs + o] = weight[(o * ofGroup + c) * area + k];
      }
    }
  }
  return moved;
}

/**
 * Numbers that are not zero, most of a drawing and of what ReLU leaves are, with the places of
 * their weights. There is one list for all layers, so that a frame allocates none.
 */
const terms = { count: 0, values: new Float64Array(0), places: new Int32Array(0) };

function startTerms(most) {
  if (terms.values.length < most) {
    terms.values = new Float64Array(most);
    terms.places = new Int32Array(most);
  }
  terms.count = 0;
}

/** Take `count` numbers from `from` on, whose weights for the outputs start at row `row`. */
function takeTerms(input, from, count, row, outputs) {
  const { values, places } = terms;
  let n = terms.count;
  for (let k = 0; k < count; k++) {
    const value = input[from + k];
    if (value !== 0) {
      values[n] = value;
      places[n++] = (row + k) * outputs;
    }
  }
  terms.count = n;
}

/** Add to the totals the terms times their weights: eight at once, which keeps totals in hand. */
function addTerms(totals, weight) {
  const { values: x, places: p, count } = terms;
  const outputs = totals.length;
  let n = 0;
  for (; n + 8 <= count; n += 8) {
    const p0 = p[n], p1 = p[n + 1], p2 = p[n + 2], p3 = p[n + 3];
    const p4 = p[n + 4], p5 = p[n + 5], p6 = p[n + 6], p7 = p[n + 7];
    const x0 = x[n], x1 = x[n + 1], x2 = x[n + 2], x3 = x[n + 3];
    const x4 = x[n + 4], x5 = x[n + 5], x6 = x[n + 6], x7 = x[n + 7];
    for (let o = 0; o < outputs; o++) {
      totals[o] +=
        x0 * weight[p0 + o] + x1 * weight[p1 + o] + x2 * weight[p2 + o] + x3 * weight[p3 + o] +
        x4 * weight[p4 + o] + x5 * weight[p5 + o] + x6 * weight[p6 + o] + x7 * weight[p7 + o];
    }
  }
  for (; n < count; n++) {
    const place = p[n], value = x[n];
    for (let o = 0; o < outputs; o++) totals[o] += value * weight[place + o];
  }
}

/** weightᵀ input + bias, of the inputs from number `first` on; all others are zero. */
function linear({ weight, bias }, input, first = 0) {
  const totals = Float64Array.from(bias);
  startTerms(input.length);
  takeTerms(input, 0, input.length, first, bias.length);
  addTerms(totals, weight);
  return totals;
}

function relu(numbers) {
  for (let at = 0; at < numbers.length; at++) if (numbers[at] < 0) numbers[at] = 0;
  return numbers;
}

/** The image, 0 to 1, that a decoder draws from the pose of one class; all others are masked. */
function decode(decoder, pose, parent) {
  let layer = linear(decoder[0], pose, parent * pose.length);
  for (const next of decoder.slice(1)) layer = linear(next, relu(layer));
  return Float32Array.from(layer, logistic);
}

/** With `padding` zeros on every side: [size, size, channels] -> [side, side, channels]. */
function padded(input, size, padding) {
  if (!padding) return input;
  const side = size + 2 * padding;
  const channels = input.length / (size * size);
  const output = new Float32Array(side * side * channels);
  for (let row = 0; row < size; row++) {
    const line = input.subarray(row * size * channels, (row + 1) * size * channels);
    output.set(line, ((row + padding) * side + padding) * channels);
  }
  return output;
}

/** The side of what a convolution computes from an image of this size. */
function sideOf({ kernel, stride, padding }, size) {
  return Math.floor((size + 2 * padding - kernel) / stride) + 1;
}

/** A convolution, [size, size, in] -> [side, side, out]. */
function convolve(layer, image, imageSize) {
  const { weight, bias, kernel, stride, padding } = layer;
  const input = padded(image, imageSize, padding);
  const size = imageSize + 2 * padding;
  const outputs = bias.length;
  const inputs = input.length / (size * size);
  const side = sideOf(layer, imageSize);
  const line = kernel * inputs;
  const output = new Float32Array(side * side * outputs);
  const totals = new Float64Array(outputs);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      startTerms(kernel * line);
      for (let k = 0; k < kernel; k++) {
        const from = ((row * stride + k) * size + column * stride) * inputs;
        takeTerms(input, from, line, k * line, outputs);
      }
      totals.set(bias);
      addTerms(totals, weight);
      output.set(totals, (row * side + column) * outputs);
    }
  }
  return output;
}

/** Batch normalisation, where a layer has it: of each channel, scale x + shift. */
function normalise(numbers, { scale, shift }) {
  if (!scale) return numbers;
  const channels = scale.length;
  for (let at = 0; at < numbers.length; at++) {
    numbers[at] = scale[at % channels] * numbers[at] + shift[at % channels];
  }
  return numbers;
}

/**
 * What each child adds to |s_j|: w û·s / |s|, with the weights w of the votes, [I]. These sum to
 * |s_j|; those below zero vote against the class.
 */
function sharesOf(votes, { c, weights = c, s }, parent, dim) {
  const parents = s.length / dim;
  const length = lengthAt(s, parent * dim, dim) || 1;
  const shares = new Float32Array(c.length / parents);
  for (let child = 0, edge = parent; child < shares.length; child++, edge += parents) {
    shares[child] = (weights[edge] * dot(votes, edge * dim, s, parent * dim, dim)) / length;
  }
  return shares;
}

class CapsNet {
  /**
   * Of the sizes in model.json; packed layers of the encoder, primary capsules and decoder; other
   * packed weights by their names in torch's state dict; and options of the routing.
   */
  constructor(config, { encoder, primary, decoder, weights }, options) {
    const unpacked = Object.entries(weights).map(([name, numbers]) => [name, halves(numbers)]);
    const at = Object.fromEntries(unpacked);
    this.config = config;
    this.options = options;
    this.encoder = encoder.map(unpack);
    this.primary = unpack(primary);
    const size = this.encoder.reduce((side, layer) => sideOf(layer, side), config.image_size);
    this.grid = sideOf(this.primary, size);
    this.children = config.capsule_maps * this.grid ** 2;
    // numbers of a pose, and with activations one more
    this.group = this.primary.bias.length / config.capsule_maps;
    this.learned = { score: { weight: at["score.weight"], bias: at["score.bias"] } };
    for (const [name, numbers] of Object.entries(at)) {
      if (name.startsWith(OF_ROUTING)) this.learned[name.slice(OF_ROUTING.length)] = numbers;
    }
    this.takeMatrices(at["capsules.weight"]);
    this.decoder = decoder.map(unpack);
  }

  /** Matrices [E, K, D] of the votes; those of self-routing have one more column for the logits. */
  takeMatrices(weight) {
    const { child_dim: childDim, parent_dim: dim, rows, classes } = this.config;
    const width = dim / rows;
    const lines = (this.children * classes * childDim) / rows;
    const columns = weight.length / lines;
    this.matrices = weight;
    if (columns === width) return;
    this.matrices = new Float32Array(lines * width);
    this.columnOfLogits = new Float32Array(lines);
    for (let line = 0; line < lines; line++) {
      const from = line * columns;
      this.matrices.set(weight.subarray(from, from + width), line * width);
      this.columnOfLogits[line] = weight[from + width];
    }
  }

  /**
   * Of an image, 0 to 1, [C, H, W]: poses u [I, K] of the primary capsules, by map, then place, and
   * their activations a [I], or null.
   */
  primaryCapsules(image) {
    const { image_size: size, image_channels: channels, child_dim: dim } = this.config;
    const area = size * size;
    const pixels = Float32Array.from(image, (_, at) => {
      return image[(at % channels) * area + Math.floor(at / channels)];
    });
    const [features, side] = this.encode(pixels, size);
    const grouped = convolve(this.primary, features, side);
    const places = this.grid ** 2;
    const u = new Float32Array(this.children * dim);
    const a = this.group > dim ? new Float32Array(this.children) : null;
    for (let child = 0; child < this.children; child++) {
      const [map, place] = [Math.floor(child / places), child % places];
      const from = (place * this.config.capsule_maps + map) * this.group;
      u.set(grouped.subarray(from, from + dim), child * dim);
      if (a) a[child] = logistic(grouped[from + dim]);
    }
    return { u: a ? u : SQUASHES[this.config.primary_squash](u, dim), a };
  }

  /** What the convolutions make of pixels [size, size, C]: features, and their side. */
  encode(pixels, size) {
    return this.encoder.reduce(
      ([input, side], layer) => [
        normalise(relu(convolve(layer, input, side)), layer),
        sideOf(layer, side),
      ],
      [pixels, size],
    );
  }

  /** û [I, J, D]: the poses of children, as matrices of `rows` rows, times those of the edges. */
  votes(u) {
    const { classes, child_dim: childDim, parent_dim: dim, rows } = this.config;
    const { matrices } = this;
    const height = childDim / rows, width = dim / rows;
    const votes = new Float32Array(this.children * classes * dim);
    let from = 0; // of the matrix, and to of the vote, edge by edge
    for (let to = 0, child = 0; child < u.length; child += childDim) {
      for (let j = 0; j < classes; j++, from += height * width) {
        for (let row = 0; row < rows; row++, to += width) {
          for (let k = 0; k < height; k++) {
            const value = u[child + row * height + k], line = from + k * width;
            for (let d = 0; d < width; d++) votes[to + d] += value * matrices[line + d];
          }
        }
      }
    }
    return votes;
  }

  /** The logits [I, J] that the children's poses give, of self-routing; else null. */
  logits(u) {
    if (!this.columnOfLogits) return null;
    const { classes, child_dim: childDim } = this.config;
    return Float32Array.from({ length: this.children * classes }, (_, edge) => {
      const child = Math.floor(edge / classes);
      return dot(this.columnOfLogits, edge * childDim, u, child * childDim, childDim);
    });
  }

  /** What routing makes of an image, 0 to 1, [C, H, W]: the layer and its iterations. */
  look(image, routing, iterations) {
    const { classes: parents, parent_dim: dim, child_dim: childDim } = this.config;
    const { u, a } = this.primaryCapsules(image);
    const layer = {
      votes: this.votes(u),
      logits: this.logits(u),
      a,
      strength: a ?? lengthsOf(u, this.children, childDim),
      children: this.children,
      parents,
      dim,
      learned: this.learned,
      options: this.options,
    };
    return { layer, rounds: ROUTE[routing](layer, iterations) };
  }
}
