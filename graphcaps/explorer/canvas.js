// Elements of a page, colours of its style, and images on canvases.

const byId = (id) => document.getElementById(id);

/** Give an element attributes; those that stay as they are cost no new style. */
function set(element, attributes) {
  for (const name in attributes) {
    const value = `${attributes[name]}`;
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  }
  return element;
}

function make(parent, name, attributes = {}, text = "") {
  const element = parent instanceof SVGElement
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  element.textContent = text;
  return parent.appendChild(set(element, attributes));
}

const INK = [0, 0, 0]; // style.css turns it to white on dark pages

/** The colour, [r, g, b], that style.css gives a class of elements on this page, light or dark. */
function colourOf(name) {
  const probe = make(document.body, "span", { class: name });
  const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return [r, g, b];
}

const colours = {};

function takeColours() {
  for (const name of ["for", "against", "ink"]) colours[name] = colourOf(name);
}

/**
 * Draw numbers from 0 to 1 as ink of one colour, or three channels as they are; size: { height,
 * width }.
 */
function paint(canvas, pixels, size, colour = INK) {
  fill(canvas, size, (data, area) => {
    const coloured = pixels.length === 3 * area;
    for (let at = 0, to = 0; at < area; at++, to += 4) {
      data[to] = coloured ? 255 * pixels[at] : colour[0];
      data[to + 1] = coloured ? 255 * pixels[area + at] : colour[1];
      data[to + 2] = coloured ? 255 * pixels[2 * area + at] : colour[2];
      data[to + 3] = coloured ? 255 : 255 * pixels[at];
    }
  });
}

/** Draw what is above zero in one colour and what is below in another. */
function paintSigned(canvas, pixels, size) {
  const { for: above, against: below } = colours;
  fill(canvas, size, (data, area) => {
    for (let at = 0, to = 0; at < area; at++, to += 4) {
      const colour = pixels[at] > 0 ? above : below;
      data[to] = colour[0];
      data[to + 1] = colour[1];
      data[to + 2] = colour[2];
      data[to + 3] = 255 * Math.abs(pixels[at]);
    }
  });
}

/** Draw two images of ink over each other, each in its colour. */
function paintBoth(canvas, [one, other], size, [colour, another]) {
  fill(canvas, size, (data, area) => {
    for (let at = 0, to = 0; at < area; at++, to += 4) {
      const a = one[at], b = other[at], all = a + b || 1;
      for (let k = 0; k < 3; k++) data[to + k] = (a * colour[k] + b * another[k]) / all;
      data[to + 3] = 255 * Math.max(a, b);
    }
  });
}

const kept = new WeakMap(); // the image data of each canvas, to be written again

/** Have the bytes, four for each pixel, of a canvas written, and show them. */
function fill(canvas, { height, width }, write) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let image = kept.get(canvas);
  if (image?.width !== width || image.height !== height) {
    image = context.createImageData(width, height);
    kept.set(canvas, image);
  }
  write(image.data, height * width);
  context.putImageData(image, 0, 0);
}

/** The mean over the channels, [H, W]. */
function grey(pixels, size) {
  const area = size.height * size.width;
  if (pixels.length === area) return pixels;
  const channels = pixels.length / area;
  const mean = new Float32Array(area);
  for (let at = 0; at < pixels.length; at++) mean[at % area] += pixels[at] / channels;
  return mean;
}
