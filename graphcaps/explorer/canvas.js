// Elements of a page, colours of its style, and images on canvases.

const byId = (id) => document.getElementById(id);

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
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

/** Draw numbers from 0 to 1 as ink of one colour, or three channels as they are; size: { height, width }. */
function paint(canvas, pixels, size, colour = INK) {
  const area = size.height * size.width;
  const channels = pixels.length / area;
  fill(canvas, size, (at) => channels === 3
    ? [pixels[at], pixels[area + at], pixels[2 * area + at]].map((x) => 255 * x).concat(255)
    : [...colour, 255 * pixels[at]]);
}

/** Draw what is above zero in one colour and what is below in another. */
function paintSigned(canvas, pixels, size) {
  const { for: above, against: below } = colours;
  fill(canvas, size, (at) => [...(pixels[at] > 0 ? above : below), 255 * Math.abs(pixels[at])]);
}

function fill(canvas, { height, width }, pixel) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  for (let at = 0; at < height * width; at++) {
    image.data.set(pixel(at).map(Math.round), 4 * at);
  }
  context.putImageData(image, 0, 0);
}

/** The mean over the channels, [H, W]. */
function grey(pixels, size) {
  const area = size.height * size.width;
  const channels = pixels.length / area;
  return Float32Array.from({ length: area }, (_, at) => {
    return sum(range(channels).map((channel) => pixels[channel * area + at])) / channels;
  });
}
