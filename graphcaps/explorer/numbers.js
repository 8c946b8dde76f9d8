// Numbers of the pages: unpacking, ranges and sums.

// plain loops: a net has millions of numbers
function bytes(base64) {
  const text = atob(base64);
  const content = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) content[at] = text.charCodeAt(at);
  return content;
}

/** IEEE 754 half precision: 1 bit of sign, 5 of exponent, 10 of fraction. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction) : sign * 2 ** -14 * fraction;
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

function halves(base64) {
  const packed = new Uint16Array(bytes(base64).buffer);
  const numbers = new Float32Array(packed.length);
  for (let at = 0; at < packed.length; at++) numbers[at] = HALVES[packed[at]];
  return numbers;
}

const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);
const range = (count) => Array.from({ length: count }, (_, number) => number);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const signed = (x, digits) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(digits)}`;
const fixed = (x, digits) => (x < 0 ? signed(x, digits) : x.toFixed(digits));
const percent = (share) => `${fixed(100 * share, Math.abs(share) < 0.0995 ? 1 : 0)} %`;
