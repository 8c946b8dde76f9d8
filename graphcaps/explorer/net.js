// A CapsNet in the browser: an image -> primary capsules -> votes -> routing -> a reconstruction.
//
// Arrays are flat, in the order that their comments give, the last axis running fastest. Symbols
// are those of graphcaps/routing/README.md: u of children i, votes û, logits b, coupling c,
// weighted sums s and class capsules v of parents j.

const PRIMARY_STRIDE = 2;

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

/** The length of the vector of `dim` numbers that starts at `from`. */
function lengthAt(numbers, from, dim) {
  let square = 0;
  for (let d = 0; d < dim; d++) square += numbers[from + d] ** 2;
  return Math.sqrt(square);
}

/** Shrink every vector of `dim` numbers to a length below 1: |s|² / (1 + |s|²) · s / |s|. */
function squash(s, dim) {
  const v = new Float32Array(s.length);
  for (let from = 0; from < s.length; from += dim) {
    const length = lengthAt(s, from, dim);
    const factor = length / (1 + length * length);
    for (let d = 0; d < dim; d++) v[from + d] = factor * s[from + d];
  }
  return v;
}

/** c: softmax of the logits b [I, J] over the parents of each child. */
function couple(b, parents) {
  const c = new Float32Array(b.length);
  for (let from = 0; from < b.length; from += parents) {
    let most = -Infinity;
    for (let j = 0; j < parents; j++) most = Math.max(most, b[from + j]);
    let total = 0;
    for (let j = 0; j < parents; j++) total += c[from + j] = Math.exp(b[from + j] - most);
    for (let j = 0; j < parents; j++) c[from + j] /= total;
  }
  return c;
}

/** û · v of an edge: of the vote and the outcome that start at these places. */
function dot(votes, from, v, to, dim) {
  let total = 0;
  for (let d = 0; d < dim; d++) total += votes[from + d] * v[to + d];
  return total;
}

/**
 * Routing of votes [I, J, D], from equal coupling. Dynamic routing (Sabour et al. 2017,
 * procedure 1) adds û·v to the logits after each iteration; uniform routing leaves them at 0.
 *
 * Returns b and c [I, J], s and v [J, D] and the lengths |v| [J] of every iteration.
 */
function route(votes, { children, parents, dim, routing, iterations }) {
  let b = new Float32Array(children * parents);
  return range(iterations).map(() => {
    const c = couple(b, parents);
    const s = new Float32Array(parents * dim);
    for (let edge = 0; edge < c.length; edge++) {
      const to = (edge % parents) * dim;
      for (let d = 0; d < dim; d++) s[to + d] += c[edge] * votes[edge * dim + d];
    }
    const v = squash(s, dim);
    const lengths = Float32Array.from(range(parents), (j) => lengthAt(v, j * dim, dim));
    const iteration = { b, c, s, v, lengths };
    if (routing === "dynamic") {
      b = b.slice();
      for (let edge = 0; edge < b.length; edge++) {
        b[edge] += dot(votes, edge * dim, v, (edge % parents) * dim, dim);
      }
    }
    return iteration;
  });
}

/**
 * What each child adds to |s_j|: c û·v / |v|, [I]. Since v_j points where s_j does, these sum to
 * |s_j|; those below zero vote against the class.
 */
function sharesOf(votes, { c, v, lengths }, parent, dim) {
  const parents = lengths.length;
  return Float32Array.from({ length: c.length / parents }, (_, child) => {
    const edge = child * parents + parent;
    return (c[edge] * dot(votes, edge * dim, v, parent * dim, dim)) / (lengths[parent] || 1);
  });
}

class CapsNet {
  /** Of the sizes in model.json and of packed weights, by their names in torch's state dict. */
  constructor(config, weights) {
    const at = (name) => halves(weights[name]);
    const kernel = config.kernel_size;
    const [channels, features] = [config.image_channels, config.conv_channels];
    this.config = config;
    this.featureSize = config.image_size - kernel + 1;
    this.grid = Math.floor((this.featureSize - kernel) / PRIMARY_STRIDE) + 1;
    this.children = config.capsule_maps * this.grid ** 2;
    this.conv = {
      weight: channelsLast(at("conv.0.weight"), features, channels, kernel),
      bias: at("conv.0.bias"),
      kernel,
      stride: 1,
    };
    const poses = config.capsule_maps * config.child_dim;
    this.primary = {
      weight: channelsLast(at("primary.conv.weight"), poses, features, kernel),
      bias: at("primary.conv.bias"),
      kernel,
      stride: PRIMARY_STRIDE,
    };
    this.matrices = at("capsules.weight");
    this.decoder = unpackDecoder(weights.decoder);
  }

  /** Poses u [I, K] of the primary capsules of an image, 0 to 1, [C, H, W]; by map, then place. */
  primaryCapsules(image) {
    const { image_size: size, image_channels: channels, child_dim: dim } = this.config;
    const area = size * size;
    const pixels = Float32Array.from(image, (_, at) => {
      return image[(at % channels) * area + Math.floor(at / channels)];
    });
    const features = convolve(this.conv, pixels, size).map((x) => Math.max(0, x));
    const grouped = convolve(this.primary, features, this.featureSize);
    const places = this.grid ** 2;
    const u = new Float32Array(grouped.length);
    for (let child = 0; child < this.children; child++) {
      const [map, place] = [Math.floor(child / places), child % places];
      const from = (place * this.config.capsule_maps + map) * dim;
      u.set(grouped.subarray(from, from + dim), child * dim);
    }
    return squash(u, dim);
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

  /** All that routing makes of an image, 0 to 1, [C, H, W]; see `route`. */
  look(image, routing, iterations) {
    const { classes: parents, parent_dim: dim } = this.config;
    const u = this.primaryCapsules(image);
    const votes = this.votes(u);
    const rounds = route(votes, { children: this.children, parents, dim, routing, iterations });
    return { image, u, votes, rounds };
  }
}
