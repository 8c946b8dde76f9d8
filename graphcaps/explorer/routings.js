// The routings of graphcaps/routing/README.md, from votes to class capsules.
//
// Each takes a layer: { votes [I, J, D], a [I], the activations of the children, or null; children,
// parents, dim; learned, parameters by their names; options }, and how many iterations are wanted.
// It returns that many iterations, { b, c [I, J], s, v [J, D], lengths [J] }: `lengths` say how
// sure the net is of each class, and s is the sum of the votes, each times `weights` [I, J] where
// these are not c. What else equations.js says of an iteration lies beside these. A routing without
// iterations returns the same one again and again.

const SMALLEST_MASS = 1e-7; // where N is below it and something is divided by N, it counts as this
const EPSILON_OF_LAYER_NORM = 1e-5;

// vectors

/** û · v of an edge: of the vote and the parent that start at these places. */
function dot(votes, from, v, to, dim) {
  let total = 0;
  for (let d = 0; d < dim; d++) total += votes[from + d] * v[to + d];
  return total;
}

/** The length of the vector of `dim` numbers that starts at `from`. */
function lengthAt(numbers, from, dim) {
  return Math.sqrt(dot(numbers, from, numbers, from, dim));
}

function lengthsOf(v, parents, dim) {
  return Float32Array.from({ length: parents }, (_, j) => lengthAt(v, j * dim, dim));
}

/** Change the length of every vector of `dim` numbers, and keep its direction. */
function resized(s, dim, resize) {
  const v = new Float32Array(s.length);
  for (let from = 0; from < s.length; from += dim) {
    const length = lengthAt(s, from, dim);
    const factor = length > 0 ? resize(length) / length : 0;
    for (let d = 0; d < dim; d++) v[from + d] = factor * s[from + d];
  }
  return v;
}

/** Shrink every vector of `dim` numbers to a length below 1: |s|² / (1 + |s|²) · s / |s|. */
function squash(s, dim) {
  return resized(s, dim, (length) => (length * length) / (1 + length * length));
}

/** The same, steeper at 0: (1 − e^−|s|) · s / |s|. */
function exponentialSquash(s, dim) {
  return resized(s, dim, (length) => -Math.expm1(-length));
}

const SQUASHES = { squash, exponential_squash: exponentialSquash };

const logistic = (x) => 1 / (1 + Math.exp(-x));
const logOfLogistic = (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));

// passes over the edges

function equalCoupling({ children, parents }) {
  return new Float32Array(children * parents).fill(1 / parents);
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

/** Σ_i w_ij û_ij, [J, D]; four children at once, which reads and writes the sums less often. */
function weightedSums(weights, { votes, children, parents, dim }) {
  const s = new Float64Array(parents * dim);
  const next = parents * dim; // from the votes of a child to those of the next
  let child = 0;
  for (; child + 4 <= children; child += 4) {
    for (let j = 0; j < parents; j++) {
      const edge = child * parents + j, from = edge * dim, to = j * dim;
      const w0 = weights[edge], w1 = weights[edge + parents];
      const w2 = weights[edge + 2 * parents], w3 = weights[edge + 3 * parents];
      for (let d = 0; d < dim; d++) {
        const at = from + d;
        s[to + d] += w0 * votes[at] + w1 * votes[at + next] +
          w2 * votes[at + 2 * next] + w3 * votes[at + 3 * next];
      }
    }
  }
  for (let edge = child * parents; edge < weights.length; edge++) {
    const weight = weights[edge], from = edge * dim, to = (edge % parents) * dim;
    for (let d = 0; d < dim; d++) s[to + d] += weight * votes[from + d];
  }
  return s;
}

/** û_ij · p_j of every edge times a factor, plus the logits `before`, if given, [I, J]. */
function agreements(p, { votes, children, parents, dim }, factor = 1, before = null) {
  const b = new Float32Array(children * parents);
  for (let edge = 0, parent = 0; edge < b.length; edge++) {
    b[edge] = factor * dot(votes, edge * dim, p, parent * dim, dim) + (before ? before[edge] : 0);
    if (++parent === parents) parent = 0;
  }
  return b;
}

/** Of a routing without iterations: the same one again and again. */
const repeated = (iteration, times) => Array(times).fill(iteration);

// routings without activations

/** Equal coupling: the first iteration of dynamic routing. */
function routeUniformly(layer, iterations) {
  return repeated(routeDynamically(layer, 1)[0], iterations);
}

/** Sabour et al. 2017, procedure 1: û·v is added to the logits after each iteration. */
function routeDynamically(layer, iterations) {
  const { children, parents, dim } = layer;
  const found = [];
  let b = new Float32Array(children * parents);
  for (let r = 0; r < iterations; r++) {
    const c = r ? couple(b, parents) : equalCoupling(layer);
    const s = weightedSums(c, layer);
    const v = squash(s, dim);
    found.push({ b, c, s, v, lengths: lengthsOf(v, parents, dim) });
    if (r + 1 < iterations) b = agreements(v, layer, 1, b);
  }
  return found;
}

/** Mazzia et al. 2021: the votes for a parent attend to each other, once; β is added to c. */
function routeBySelfAttention(layer, iterations) {
  const { parents, dim, votes, learned } = layer;
  const total = weightedSums(equalCoupling(layer).fill(1), layer);
  const b = agreements(total, layer, 1 / Math.sqrt(dim));
  const c = couple(b, parents);
  const weights = c.map((x, edge) => x + learned.beta[edge]);
  const s = weightedSums(weights, layer);
  const v = exponentialSquash(s, dim);
  return repeated({ b, c, weights, s, v, lengths: lengthsOf(v, parents, dim) }, iterations);
}

/** Tsai et al. 2020: the logits are û·v/√D of the iteration before, v is LayerNorm(s). */
function routeByAttention(layer, iterations) {
  const { children, parents, dim, learned } = layer;
  const found = [];
  let b = new Float32Array(children * parents);
  for (let r = 0; r < iterations; r++) {
    const c = couple(b, parents);
    const s = weightedSums(c, layer);
    const v = layerNorm(s, dim, learned["norm.weight"], learned["norm.bias"]);
    const lengths = Float32Array.from({ length: parents }, (_, parent) => {
      return logistic(dot(v, parent * dim, learned.score.weight, 0, dim) + learned.score.bias[0]);
    });
    found.push({ b, c, s, v, lengths });
    b = agreements(v, layer, 1 / Math.sqrt(dim));
  }
  return found;
}

function layerNorm(s, dim, scale, shift) {
  const v = new Float32Array(s.length);
  for (let from = 0; from < s.length; from += dim) {
    const row = s.subarray(from, from + dim);
    const mean = sum(row) / dim;
    const variance = row.reduce((total, x) => total + (x - mean) ** 2, 0) / dim;
    const deviation = Math.sqrt(variance + EPSILON_OF_LAYER_NORM);
    for (let d = 0; d < dim; d++) v[from + d] = ((row[d] - mean) / deviation) * scale[d] + shift[d];
  }
  return v;
}

// routings with activations

/** a_i c_ij, [I, J]. */
function weighed(c, { a, parents }) {
  return c.map((x, edge) => x * a[Math.floor(edge / parents)]);
}

/** N_j = Σ_i w_ij, [J]. */
function masses(weights, parents) {
  const N = new Float64Array(parents);
  for (let edge = 0; edge < weights.length; edge++) N[edge % parents] += weights[edge];
  return N;
}

/** Divide weights of edges, [I, J], or sums, [J, D], by a number of the parent. */
function divided(numbers, divisor, parentOf) {
  return numbers.map((x, at) => x / divisor[parentOf(at)]);
}

/** Σ_i w_ij (û_ij − v_j)², [J, D]. */
function squaresAbout(v, weights, { votes, parents, dim }) {
  const squares = new Float64Array(parents * dim);
  for (let edge = 0, parent = 0; edge < weights.length; edge++) {
    const weight = weights[edge], from = edge * dim, to = parent * dim;
    for (let d = 0; d < dim; d++) squares[to + d] += weight * (votes[from + d] - v[to + d]) ** 2;
    if (++parent === parents) parent = 0;
  }
  return squares;
}

/** The logits k_j − ½ Σ_d τ_jd (û_ijd − v_jd)² of Gaussians of the precisions τ [J, D], [I, J]. */
function logOfGaussians(k, v, precisions, { votes, children, parents, dim }) {
  const b = new Float32Array(children * parents);
  for (let edge = 0, parent = 0; edge < b.length; edge++) {
    const from = edge * dim, to = parent * dim;
    let distance = 0;
    for (let d = 0; d < dim; d++) {
      distance += precisions[to + d] * (votes[from + d] - v[to + d]) ** 2;
    }
    b[edge] = k[parent] - distance / 2;
    if (++parent === parents) parent = 0;
  }
  return b;
}

/** For each parent, the sum over the numbers that a function makes of its own, [J]. */
function sumsOfParents(numbers, parents, dim, of) {
  return Float64Array.from({ length: parents }, (_, j) => {
    let total = 0;
    for (let d = 0; d < dim; d++) total += of(numbers[j * dim + d], d, j);
    return total;
  });
}

/** Hinton et al. 2018, procedure 1. */
function routeByEm(layer, iterations) {
  const { children, parents, dim, learned, options } = layer;
  const found = [];
  let b = new Float32Array(children * parents);
  for (let t = 0; t < iterations; t++) {
    const c = couple(b, parents);
    const weights = weighed(c, layer);
    const N = masses(weights, parents);
    const divisor = N.map((mass) => Math.max(mass, SMALLEST_MASS));
    const mu = divided(weightedSums(weights, layer), divisor, (at) => Math.floor(at / dim));
    const variance = squaresAbout(mu, weights, layer)
      .map((total, at) => total / divisor[Math.floor(at / dim)] + options.min_variance);
    const deviations = sumsOfParents(variance, parents, dim, (x) => Math.log(x) / 2); // Σ ln σ
    const lambda = options.final_inverse_temperature * (1 - 0.95 ** (t + 1));
    const logits = N.map((mass, j) => {
      return lambda * (learned.beta_a[j] - mass * (dim * learned.beta_u[j] + deviations[j]));
    });
    found.push({
      b,
      c,
      weights: divided(weights, divisor, (edge) => edge % parents),
      s: mu,
      v: Float32Array.from(mu),
      lengths: Float32Array.from(logits, logistic),
      N,
      deviations,
      a: layer.a,
    });
    const k = logits.map((logit, j) => {
      return logOfLogistic(logit) - deviations[j] - (dim / 2) * Math.log(2 * Math.PI);
    });
    b = logOfGaussians(k, mu, variance.map((x) => 1 / x), layer);
  }
  return found;
}

/** ψ, the derivative of ln Γ, of numbers above 0. */
function digamma(x) {
  let total = 0;
  for (; x < 6; x++) total -= 1 / x;
  const square = 1 / (x * x);
  const series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)));
  return total + Math.log(x) - 1 / (2 * x) - series;
}

/** Ribeiro et al. 2020: the posterior of Gaussians of unknown mean and precision. */
function routeByVariationalBayes(layer, iterations) {
  const { children, parents, dim, learned, options } = layer;
  const { alpha0, kappa0, psi0 } = options;
  const nu0 = options.nu0 ?? dim + 1;
  const found = [];
  let b = new Float32Array(children * parents);
  for (let r = 0; r < iterations; r++) {
    const c = couple(b, parents);
    const weights = weighed(c, layer);
    const N = masses(weights, parents);
    const kappa = N.map((mass) => kappa0 + mass);
    const m = divided(weightedSums(weights, layer), kappa, (at) => Math.floor(at / dim));
    const inversePsi = squaresAbout(m, weights, layer)
      .map((total, at) => psi0 + total + kappa0 * m[at] ** 2);
    const logDet = sumsOfParents(inversePsi, parents, dim, (x, d, j) => {
      return digamma((nu0 + N[j] - d) / 2) + Math.LN2 - Math.log(x);
    });
    const all = digamma(alpha0 * parents + sum(N));
    const logPi = N.map((mass) => digamma(alpha0 + mass) - all);
    const lengths = Float32Array.from(logPi, (log, j) => {
      const entropy = (dim * Math.log(2 * Math.PI * Math.E) - logDet[j]) / 2;
      return logistic(learned.beta_a[j] - learned.beta_u[j] - Math.exp(log) * entropy);
    });
    found.push({
      b,
      c,
      weights: divided(weights, kappa, (edge) => edge % parents),
      s: m,
      v: Float32Array.from(m),
      lengths,
      N,
      logDet,
      logPi,
      a: layer.a,
    });
    const k = logPi.map((log, j) => log + (logDet[j] - dim / kappa[j]) / 2);
    const precisions = inversePsi.map((x, at) => (nu0 + N[Math.floor(at / dim)]) / x);
    b = logOfGaussians(k, m, precisions, layer);
  }
  return found;
}

/** Hahn et al. 2019, equations 3 to 5: the logits are those that the children's poses give. */
function routeBySelf(layer, iterations) {
  const { parents, dim, a, learned } = layer;
  const b = layer.logits.map((x, edge) => x + learned.prior[edge]);
  const c = couple(b, parents);
  const weights = weighed(c, layer);
  const N = masses(weights, parents);
  const divisor = N.map((mass) => Math.max(mass, SMALLEST_MASS));
  const v = divided(weightedSums(weights, layer), divisor, (at) => Math.floor(at / dim));
  const all = Math.max(sum(a), SMALLEST_MASS);
  const iteration = {
    b,
    c,
    weights: divided(weights, divisor, (edge) => edge % parents),
    s: v,
    v: Float32Array.from(v),
    lengths: Float32Array.from(N, (mass) => mass / all),
    N,
    a,
  };
  return repeated(iteration, iterations);
}

const ROUTE = {
  dynamic: routeDynamically,
  uniform: routeUniformly,
  attention: routeByAttention,
  self_attention: routeBySelfAttention,
  em: routeByEm,
  variational_bayes: routeByVariationalBayes,
  self_routing: routeBySelf,
};
