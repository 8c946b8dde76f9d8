// The report: test images of a run, whose routing is recorded in the page, in the explorer.

const records = JSON.parse(byId("records").textContent);
const { classes } = records;

const isRight = ({ labels, predicted }) => same(labels, predicted);

function describe(example) {
  const verdict = isRight(example)
    ? "classified correctly"
    : `misclassified as ${namesOf(example.predicted, classes)}`;
  return `Test image ${example.number}, ${namesOf(example.labels, classes)}, ${verdict}`;
}

/** What the explorer draws of an example, unpacked when it is first asked for. */
function lookOf(example) {
  const count = records.rounds;
  const [coupling, amounts] = [halves(example.coupling), halves(example.amounts)];
  const edges = coupling.length / count;
  return {
    title: `Test image ${example.number}`,
    truth: example.labels,
    predicted: example.main,
    image: example.pixels,
    dim: example.poses[0][0].length,
    rounds: range(count).map((r) => ({
      c: coupling.subarray(r * edges, (r + 1) * edges),
      lengths: example.lengths[r],
      pose: (parent) => example.poses[r][parent],
      amounts: (parent) => Float32Array.from({ length: edges / classes.length }, (_, child) => {
        return amounts[r * edges + child * classes.length + parent];
      }),
    })),
  };
}

const examples = records.examples.map((example) => ({
  ...example,
  pixels: Float32Array.from(bytes(example.image), (x) => x / 255),
}));

const explorer = new Explorer({
  ...records,
  decoder: records.decoder.map(unpack),
  routing: () => records.routing,
});

function pick(example) {
  example.look ??= lookOf(example);
  example.input.checked = true;
  paint(byId("picked"), example.pixels, records.image);
  set(byId("picked"), { "aria-label": describe(example) });
  byId("picked-caption").textContent = `${describe(example)}.`;
  explorer.show(example.look);
}

function buildPicks() {
  examples.forEach((example, number) => {
    const right = isRight(example);
    const label = make(byId(right ? "right" : "wrong"), "label", {
      class: right ? "pick" : "pick wrong",
    });
    example.input = make(label, "input", {
      type: "radio",
      name: "example",
      value: number,
      "aria-label": describe(example),
    });
    const face = make(label, "span", { class: "face" });
    const canvas = make(face, "canvas", {
      class: explorer.tone,
      role: "img",
      "aria-label": describe(example),
    });
    paint(canvas, example.pixels, records.image);
    const [truth, predicted] = [example.labels, example.predicted].map((numbers) => {
      return namesOf(numbers, classes);
    });
    make(face, "span", { class: "name" }, right ? truth : `✗ ${truth} → ${predicted}`);
    example.input.addEventListener("change", () => pick(example));
  });
  byId("wrong-picks").hidden = examples.every(isRight);
}

buildPicks();
byId("figures").hidden = byId("to-figures").hidden = !document.querySelector(".plate");
pick(examples[0]);
