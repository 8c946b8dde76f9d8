// What there is to say of each routing: how sure a net is of a class, what the shares of the
// children sum to, and the equations of a step. Numbers that a page does not have are left out.

// symbols of the equations
const [A, ACHILD, B, C, N, S, V, VOTE] = ["a j", "a i", "b ij", "c ij", "N j", "s j", "v j", "û ij"]
  .map((symbol) => {
    const [letter, places] = symbol.split(" ");
    return `<i>${letter}<sub>${places}</sub></i>`;
  });

// how sure a net is of a class
const MEASURES = {
  length: {
    name: "length",
    title: "Lengths",
    symbol: "|v|",
    html: `|${V}|`,
    most: "the longest capsule is",
  },
  activation: {
    name: "activation",
    title: "Activations",
    symbol: "a",
    html: A,
    most: "the most active capsule is",
  },
  confidence: {
    name: "confidence",
    title: "Confidence",
    symbol: "p",
    html: "<i>p<sub>j</sub></i>",
    most: "the net is surest of",
  },
};

const SOFTMAX = `${C} = e<sup>${B}</sup> / Σ<sub><i>k</i></sub> e<sup><i>b<sub>ik</sub></i></sup>`;
const OVER_CHILDREN = "Σ<sub><i>i</i></sub>";
const OVER_NUMBERS = "Σ<sub><i>d</i></sub>";

// Each of the following is given { round, child, parent, edge, iteration, parents, amount, total },
// of which the last two are the child's share and what the shares sum to. A line is the left side
// in HTML, a number, how it is written, and a note.

const ofEdge = (numbers, { edge }) => numbers?.[edge];
const ofParent = (numbers, { parent }) => numbers?.[parent];
function sizeOf(vectors, { parent, parents }) {
  const dim = vectors?.length / parents;
  return vectors && lengthAt(vectors, parent * dim, dim);
}

const digits = (count) => (x) => fixed(x, count);
const signedDigits = (count) => (x) => signed(x, count);

function logit(at, left, note) {
  return [left, ofEdge(at.round.b, at), digits(3), note];
}

function coupling(at) {
  const note = `equal coupling: ${(1 / at.parents).toFixed(4)}`;
  return [SOFTMAX, ofEdge(at.round.c, at), digits(4), note];
}

function sumOfVotes(at, weight, size) {
  return [`|${S}| = |${OVER_CHILDREN} ${weight} ${VOTE}|`, size, digits(3), "over all children"];
}

function sure(at, left, note) {
  return [left, ofParent(at.round.lengths, at), digits(3), note];
}

function share(at, left) {
  const note = `this child's share: ${percent(at.amount / (at.total || 1))}`;
  return [left, at.amount, signedDigits(3), note];
}

function mass(at) {
  const left = `${N} = ${OVER_CHILDREN} ${ACHILD} ${C}`;
  return [left, ofParent(at.round.N, at), digits(2), "votes for it"];
}

function activationOfChild({ round, child }) {
  return [ACHILD, round.a?.[child], digits(3), "activation of the child"];
}

function mean(at, divisor) {
  const left = `|${V}| = |${OVER_CHILDREN} ${ACHILD} ${C} ${VOTE}| / ${divisor}`;
  return [left, at.total, digits(3), "its pose"];
}

const firstOr = (at, first, later) => (at.iteration ? later : first);

const squashed = (at) => sure(at, `|${V}| = |${S}|² / (1 + |${S}|²)`, "squash");

function equationsOfDynamic(at) {
  const { round, child, parent } = at;
  const earlier = "the sum of û·v of the earlier iterations";
  const agreement = round.agreement?.(child, parent);
  return [
    logit(at, B, firstOr(at, "all logits start at 0", earlier)),
    coupling(at),
    sumOfVotes(at, C, at.total),
    squashed(at),
    share(at, `${C} ${VOTE}·${V} / |${V}|`),
    [
      `${B} + ${VOTE}·${V}`,
      agreement === undefined ? undefined : ofEdge(round.b, at) + agreement,
      digits(3),
      agreement === undefined ? "" : `the next logit: û·v is ${signed(agreement, 3)}`,
    ],
  ];
}

function equationsOfUniform(at) {
  return [
    logit(at, B, "uniform: always 0"),
    coupling(at),
    sumOfVotes(at, C, at.total),
    squashed(at),
    share(at, `${C} ${VOTE}·${V} / |${V}|`),
  ];
}

function equationsOfAttention(at) {
  const later = "with the v of the iteration before";
  const score =
    `${MEASURES.confidence.html} = logistic(<i>w</i>·${V} + <i>w</i><sub>0</sub>)`;
  return [
    logit(at, `${B} = ${VOTE}·${V} / √<i>D</i>`, firstOr(at, "all logits start at 0", later)),
    coupling(at),
    sumOfVotes(at, C, sizeOf(at.round.s, at)),
    [`|${V}| = |LayerNorm(${S})|`, sizeOf(at.round.v, at), digits(3), "all are nearly as long"],
    sure(at, score, "w: learned, for all classes alike"),
  ];
}

function equationsOfSelfAttention(at) {
  const weight = `(${C} + <i>β</i>)`;
  const { c, weights } = at.round;
  const beta = weights ? ofEdge(weights, at) - ofEdge(c, at) : undefined;
  return [
    logit(at, `${B} = ${VOTE}·${OVER_CHILDREN} ${VOTE} / √<i>D</i>`, "once, without iterations"),
    coupling(at),
    ["<i>β</i>", beta, digits(4), "learned, of this child and class"],
    sumOfVotes(at, weight, at.total),
    sure(at, `|${V}| = 1 − e<sup>−|${S}|</sup>`, "squash of this routing"),
    share(at, `${weight} ${VOTE}·${V} / |${V}|`),
  ];
}

const SHARE_OF_MEAN = `${ACHILD} ${C} ${VOTE}·${V} / (${N} |${V}|)`;

function equationsOfEm(at) {
  const logOfGaussian = `ln ${A} + ln <i>p<sub>ij</sub></i>`;
  const later = "of the iteration before; p: the vote under the Gaussian of the class";
  const deviation = "ln <i>σ<sub>jd</sub></i>";
  const deviations = ofParent(at.round.deviations, at);
  const cost = `${N} ${OVER_NUMBERS} (<i>β<sub>u</sub></i> + ${deviation})`;
  return [
    logit(at, `${B} = ${logOfGaussian}`, firstOr(at, "all logits start at 0", later)),
    coupling(at),
    activationOfChild(at),
    mass(at),
    mean(at, N),
    [`${OVER_NUMBERS} ${deviation}`, deviations, digits(2), "how far its votes are apart"],
    sure(at, `${A} = logistic(<i>λ</i>(<i>β<sub>a</sub></i> − ${cost}))`, ""),
    share(at, SHARE_OF_MEAN),
  ];
}

function equationsOfVariationalBayes(at) {
  const later = "of the iteration before: the expected logarithm of the class's Gaussian";
  const gain = "<i>β<sub>a</sub></i> − <i>β<sub>u</sub></i>";
  const [logPi, logDet] = ["E ln <i>π<sub>j</sub></i>", "E ln |<i>Λ<sub>j</sub></i>|"];
  return [
    logit(at, B, firstOr(at, "all logits start at 0", later)),
    coupling(at),
    activationOfChild(at),
    mass(at),
    mean(at, `(<i>κ</i><sub>0</sub> + ${N})`),
    [logDet, ofParent(at.round.logDet, at), digits(2), "how close its votes are"],
    [logPi, ofParent(at.round.logPi, at), digits(2), "how large its part of all votes is"],
    sure(at, `${A} = logistic(${gain} − exp(${logPi}) <i>H<sub>j</sub></i>)`, "H: its entropy"),
    share(at, `${ACHILD} ${C} ${VOTE}·${V} / ((<i>κ</i><sub>0</sub> + ${N}) |${V}|)`),
  ];
}

function equationsOfSelfRouting(at) {
  const logits = `${B} = <i>W</i>′<i><sub>ij</sub></i>·<i>u<sub>i</sub></i> + prior`;
  return [
    logit(at, logits, "the child decides, without iterations"),
    coupling(at),
    activationOfChild(at),
    mass(at),
    mean(at, N),
    sure(at, `${A} = ${N} / ${OVER_CHILDREN} ${ACHILD}`, "its part of all votes"),
    share(at, SHARE_OF_MEAN),
  ];
}

const UNKNOWN = {
  of: (at) => [coupling(at)],
  measure: "confidence",
  strength: "activation",
  about: ".",
};

// `sum` is what the children's shares sum to, and `share` how each is written. A routing whose
// poses are not weighted sums of votes has neither; coupling × `strength` of the child is shown
// instead. If the pose is a mean, a share does not say whether the class is present. `about` ends
// the sentence about coupling.
const OF_SUM = {
  sum: "|s|",
  title: (name) => `Who carries the ${name}`,
  carry: "carry",
  against: "vote against it",
};
const OF_MEAN = {
  sum: "|v|",
  title: (name) => `Who makes the pose of ${name}`,
  carry: "make",
  against: "pull the other way",
};
const EQUATIONS = {
  dynamic: {
    of: equationsOfDynamic,
    measure: "length",
    ...OF_SUM,
    share: "c û·v/|v|",
    about: ", which starts equal and grows where vote and outcome agree.",
  },
  uniform: {
    of: equationsOfUniform,
    measure: "length",
    ...OF_SUM,
    share: "c û·v/|v|",
    about: ", which stays equal: the control of the other routings.",
  },
  attention: {
    of: equationsOfAttention,
    measure: "confidence",
    strength: "|u|",
    about: ", which starts equal; each iteration replaces it by how well vote and outcome agree.",
  },
  self_attention: {
    of: equationsOfSelfAttention,
    measure: "length",
    ...OF_SUM,
    share: "(c + β) û·v/|v|",
    about: ", which is large where a vote agrees with the sum of all votes for the class. There " +
      "are no iterations.",
  },
  em: {
    of: equationsOfEm,
    measure: "activation",
    ...OF_MEAN,
    share: "a c û·v/(N |v|)",
    about: ". Each class is a Gaussian, fitted to the votes that couple to it; coupling starts " +
      "equal and goes to the classes whose Gaussians explain a vote best.",
  },
  variational_bayes: {
    of: equationsOfVariationalBayes,
    measure: "activation",
    ...OF_MEAN,
    share: "a c û·v/((κ₀ + N) |v|)",
    about: ". Each class is a Gaussian of unknown mean and precision; coupling starts equal and " +
      "goes to the classes that explain a vote best.",
  },
  self_routing: {
    of: equationsOfSelfRouting,
    measure: "activation",
    ...OF_MEAN,
    share: "a c û·v/(N |v|)",
    about: ", which its own pose decides. There are no iterations.",
  },
};

/** Of a routing by its name; of one that was written elsewhere, what holds for all. */
function equationsOf(routing) {
  const { measure, ...found } = Object.hasOwn(EQUATIONS, routing) ? EQUATIONS[routing] : UNKNOWN;
  return { ...found, measure: MEASURES[measure] };
}
