// What a net says of an image, by the rule and thresholds of graphcaps/nets/verdict.py.

/** The classes of the one or two longest capsules that are long enough, the longest first. */
function presentClasses(lengths, { lengthOfPresent }) {
  return range(lengths.length)
    .filter((j) => lengths[j] >= lengthOfPresent)
    .sort((a, b) => lengths[b] - lengths[a] || a - b)
    .slice(0, 2);
}

/** The predicted classes: so many longest capsules, or for 0 all that are longer than 0.5. */
function predictedClasses(lengths, labelsPerImage) {
  const order = range(lengths.length).sort((a, b) => lengths[b] - lengths[a] || a - b);
  return labelsPerImage ? order.slice(0, labelsPerImage) : order.filter((j) => lengths[j] > 0.5);
}

const inOrder = (classes) => [...classes].sort((a, b) => a - b);
const same = (some, others) => `${inOrder(some)}` === `${inOrder(others)}`;
const namesOf = (classes, names) => inOrder(classes).map((j) => names[j]).join(" + ") || "none";

/** Σ (x − x̂)² / Σ x² of an image and what is drawn of it; infinite for an empty image. */
function relativeError(image, drawn) {
  let [difference, ink] = [0, 0];
  image.forEach((x, at) => {
    difference += (x - drawn[at]) ** 2;
    ink += x * x;
  });
  return ink > 0 ? difference / ink : Infinity;
}

const union = (images) => images.reduce((a, b) => a.map((x, at) => Math.max(x, b[at])));

/** Classes, and the error, null without a decoder; `draw` gives the image of a class. */
function judge(lengths, image, draw, thresholds) {
  const present = presentClasses(lengths, thresholds);
  const shown = present.length ? present : [lengths.indexOf(largest(lengths))];
  const error = draw ? relativeError(image, union(shown.map(draw))) : null;
  const unlike = error !== null && !(error <= thresholds.largestError);
  return { classes: unlike ? [] : present.sort((a, b) => a - b), error };
}

/** The verdict in words. */
function told({ classes }, names) {
  const kind = names.every((name) => /^\d$/.test(name)) ? "digit" : "class";
  if (!classes.length) return `no ${kind}`;
  if (classes.length === 1) return names[classes[0]];
  const both = kind === "digit" ? "two digits" : "two classes";
  return `${both}, ${names[classes[0]]} and ${names[classes[1]]}`;
}
