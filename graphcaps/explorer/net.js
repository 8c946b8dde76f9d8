// A CapsNet in the browser: an image -> primary capsules -> votes -> routing -> a reconstruction.
//
// Arrays are flat, in the order that their comments give, the last axis running fastest. Symbols
// are those of graphcaps/routing/README.md: u of children i, votes û, logits b, coupling c,
// weighted sums s and class capsules v of parents j.

const PRIMARY_STRIDE = 2;
const OF_ROUTING = "capsules.routing.";

/** The layers of a decoder from their packed weights, [out, in] each. */
function unpackDecoder(layers) {
  return layers.map(({ weight, bias }) => ({ weight: halves(weight), bias: halves(bias) }));
}

/** weight · input + bias, of the inputs from number `first` on; all others are zero. */
function linear({ weight, bias }, input, first = 0) {
  const columns = weight.length / bias.length;
  return bias.map((start, row) => {
    let total = start;
    const from = row * columns + first;
    for (let k = 0; k < input.length; k++) total += weight[from + k] * input[k];
    return total;
  });
}

/** The image, 0 to 1, that a decoder draws from the pose of one class; all others are masked. */
function decode(decoder, pose, parent) {
  const [first, ...others] = decoder;
  let layer = linear(first, pose, parent * pose.length);
  for (const next of others) {
    layer = linear(next, layer.map((x) => Math.max(0, x)));
  }
  return layer.map((x) => 1 / (1 + Math.exp(-x)));
}

/** From [out, in, kernel, kernel], as torch has it, to [kernel, kernel, in, out]. */
function channelsLast(weight, outputs, inputs, kernel) {
  const area = kernel * kernel;
  const moved = new Float32Array(weight.length);
  for (let o = 0; o < outputs; o++) {
    for (let c = 0; c < inputs; c++) {
      for (let k = 0; k < area; k++) {
        moved[(k * inputs + c) * outputs + o] = weight[(o * inputs + c) * area + k];
      }
    }
  }
  return moved;
}

/**
 * A convolution without padding, [size, size, in] -> [side, side, out]. Each input is added to
 * all outputs that see it, so that zeros, most of a drawing and of what ReLU leaves, cost nothing.
 */
function convolve({ weight, bias, kernel, stride }, input, size) {
  const outputs = bias.length;
  const inputs = input.length / (size * size);
  const side = Math.floor((size - kernel) / stride) + 1;
  const output = new Float32Array(side * side * outputs);
  for (let at = 0; at < output.length; at += outputs) output.set(bias, at);
  const firstSeen = (pixel) => Math.max(0, Math.ceil((pixel - kernel + 1) / stride));
  const lastSeen = (pixel) => Math.min(side - 1, Math.floor(pixel / stride));
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      for (let channel = 0; channel < inputs; channel++) {
        const value = input[(y * size + x) * inputs + channel];
        if (value === 0) continue;
        for (let row = firstSeen(y); row <= lastSeen(y); row++) {
          for (let column = firstSeen(x); column <= lastSeen(x); column++) {
            const within = (y - row * stride) * kernel + (x - column * stride);
            const from = (within * inputs + channel) * outputs;
            const to = (row * side + column) * outputs;
            for (let o = 0; o < outputs; o++) output[to + o] += value * weight[from + o];
          }
        }
      }
    }
  }
  return output;
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
   * Of the sizes in model.json, packed weights by their names in torch's state dict, and options
   * of the routing.
   */
  constructor(config, weights, options) {
    const unpacked = Object.entries(weights).filter(([name]) => name !== "decoder");
    const at = Object.fromEntries(unpacked.map(([name, numbers]) => [name, halves(numbers)]));
    const kernel = config.kernel_size;
    const [channels, features] = [config.image_channels, config.conv_channels];
    this.config = config;
    this.options = options;
    this.featureSize = config.image_size - kernel + 1;
    this.grid = Math.floor((this.featureSize - kernel) / PRIMARY_STRIDE) + 1;
    this.children = config.capsule_maps * this.grid ** 2;
    this.conv = {
      weight: channelsLast(at["conv.0.weight"], features, channels, kernel),
      bias: at["conv.0.bias"],
      kernel,
      stride: 1,
    };
    const poses = at["primary.conv.bias"].length;
    this.primary = {
      weight: channelsLast(at["primary.conv.weight"], poses, features, kernel),
      bias: at["primary.conv.bias"],
      kernel,
      stride: PRIMARY_STRIDE,
    };
    this.group = poses / config.capsule_maps; // a pose, and with activations one number more
    this.learned = { score: { weight: at["score.weight"], bias: at["score.bias"] } };
    for (const [name, numbers] of Object.entries(at)) {
      if (name.startsWith(OF_ROUTING)) this.learned[name.slice(OF_ROUTING.length)] = numbers;
    }
    this.takeMatrices(at["capsules.weight"]);
    this.decoder = unpackDecoder(weights.decoder);
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
    const features = convolve(this.conv, pixels, size).map((x) => Math.max(0, x));
    const grouped = convolve(this.primary, features, this.featureSize);
    const places = this.grid ** 2;
    const u = new Float32Array(this.children * dim);
    const a = this.group > dim ? new Float32Array(this.children) : null;
    for (let child = 0; child < this.children; child++) {
      const [map, place] = [Math.floor(child / places), child % places];
      const from = (place * this.config.capsule_maps + map) * this.group;
      u.set(grouped.subarray(from, from + dim), child * dim);
      if (a) a[child] = logistic(grouped[from + dim]);
    }
    return { u: a ? u : squash(u, dim), a };
  }

  /** û [I, J, D]: the poses of children, as matrices of `rows` rows, times those of the edges. */
  votes(u) {
    const { classes, child_dim: childDim, parent_dim: dim, rows } = this.config;
    const [height, width] = [childDim / rows, dim / rows];
    const votes = new Float32Array(this.children * classes * dim);
    for (let edge = 0; edge < this.children * classes; edge++) {
      const child = Math.floor(edge / classes) * childDim;
      for (let row = 0; row < rows; row++) {
        const to = edge * dim + row * width;
        for (let k = 0; k < height; k++) {
          const from = (edge * height + k) * width;
          const value = u[child + row * height + k];
          for (let d = 0; d < width; d++) votes[to + d] += value * this.matrices[from + d];
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
      return dot(this.columnOfLogits, edge * childDim, u, Math.floor(edge / classes) * childDim, childDim);
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
