// The mask of inpainting, drawn with mouse, touch, pen or keys; what is opaque is to be painted.

import { Problem } from "./protocol.js";

const canvas = document.getElementById("mask");
const ring = document.getElementById("brush");
const size = document.getElementById("brush-size");
const eraser = document.getElementById("erase");
const context = canvas.getContext("2d", { willReadFrequently: true });
/** What was done, in order: functions that do it again. */
let done = [];
/** The stroke that is being drawn: {points, width, erase}. */
let stroke = null;
/** Where keys have the brush, in pixels of the image, and whether it is down. */
const cursor = { x: 0, y: 0, down: false };

export function startMask(announce, onProblem) {
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 && event.button !== 5) return;
    canvas.setPointerCapture(event.pointerId);
    begin(at(event), event.button === 5);
  });
  canvas.addEventListener("pointermove", (event) => {
    const events = event.getCoalescedEvents?.() ?? [];
    if (stroke) for (const one of events.length ? events : [event]) extend(at(one));
    showRing(at(event));
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (stroke = null));
  for (const name of ["pointerleave", "blur"]) canvas.addEventListener(name, () => (ring.hidden = true));
  canvas.addEventListener("keydown", (event) => onKey(event, announce));
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && showRing(cursor));
  eraser.addEventListener("click", () =>
    eraser.setAttribute("aria-pressed", eraser.getAttribute("aria-pressed") !== "true"));
  on("undo", () => {
    done.pop();
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const again of done) again();
  });
  on("clear", () => perform(() => context.clearRect(0, 0, canvas.width, canvas.height)));
  on("invert", () => perform(() => filled("source-out")));
  const file = document.getElementById("mask-file");
  on("mask-load", () => file.click());
  file.addEventListener("change", async () => {
    if (file.files[0]) await loadMask(file.files[0]).then(() => announce("The mask is loaded."), onProblem);
    file.value = "";
  });
}

/** Fit another size of the image; what was drawn is scaled with it. */
export function sizeMask(width, height, keep) {
  const before = keep && done.length ? copyOf(canvas) : null;
  [canvas.width, canvas.height] = [width, height];
  done = [];
  [cursor.x, cursor.y, cursor.down] = [width >> 1, height >> 1, false];
  size.max = Math.max(8, Math.round(Math.max(width, height) / 2));
  size.value = Math.max(2, Math.round(Math.max(width, height) / 8));
  if (before) perform(() => context.drawImage(before, 0, 0, width, height));
}

/** White where to paint, black elsewhere, as a PNG; null: nothing is drawn. */
export async function maskFile() {
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  if (!data.some((value, k) => k % 4 === 3 && value)) return null;
  const made = copyOf(canvas);
  const drawn = made.getContext("2d");
  filled("source-in", drawn, "white");
  filled("destination-over", drawn, "black");
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}

/** Take a mask from a file: what is light and opaque is to be painted. */
export async function loadMask(file) {
  const { width, height } = canvas;
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem("The mask file cannot be read as an image. Take a PNG, JPEG or WebP file.", "mask_image");
  });
  if (Math.abs(bitmap.width * height - bitmap.height * width) >= Math.max(width, height, bitmap.width, bitmap.height)) {
    throw new Problem(
      `The mask has another shape than the image: ${bitmap.width} × ${bitmap.height}, not ${width} × ${height}.`,
      "mask_image",
    );
  }
  const loaded = copyOf(bitmap, width, height);
  const pixels = loaded.getContext("2d").getImageData(0, 0, width, height);
  for (let k = 0; k < pixels.data.length; k += 4) {
    const [red, green, blue, alpha] = pixels.data.subarray(k, k + 4);
    pixels.data[k + 3] = ((0.299 * red + 0.587 * green + 0.114 * blue) * alpha) / 255;
  }
  loaded.getContext("2d").putImageData(pixels, 0, 0);
  perform(() => {
    context.clearRect(0, 0, width, height);
    context.drawImage(loaded, 0, 0);
    filled("source-in");
  });
}

function perform(action) {
  action();
  done.push(action);
}

function begin(point, erase = false) {
  const erases = erase || eraser.getAttribute("aria-pressed") === "true";
  const own = { points: [point], width: Number(size.value), erases };
  stroke = own;
  perform(() => own.points.forEach((_, k) => segment(own, k)));
}

function extend(point) {
  stroke.points.push(point);
  segment(stroke, stroke.points.length - 1);
}

function segment({ points, width, erases }, k) {
  const [from, to] = [points[Math.max(k - 1, 0)], points[k]];
  context.globalCompositeOperation = erases ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = colour();
  context.lineWidth = width;
  context.lineCap = "round";
  context.beginPath();
  if (k) {
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
  } else {
    context.arc(to.x, to.y, width / 2, 0, 7);
    context.fill();
  }
  context.globalCompositeOperation = "source-over";
}

function filled(how, into = context, style = colour()) {
  into.globalCompositeOperation = how;
  into.fillStyle = style;
  into.fillRect(0, 0, canvas.width, canvas.height);
  into.globalCompositeOperation = "source-over";
}

function onKey(event, announce) {
  const step = event.shiftKey ? 1 : Math.max(1, Math.round(size.value / 4));
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const move = moves[event.key];
  if (move) {
    cursor.x = Math.min(canvas.width, Math.max(0, cursor.x + move[0] * step));
    cursor.y = Math.min(canvas.height, Math.max(0, cursor.y + move[1] * step));
    if (cursor.down) extend({ x: cursor.x, y: cursor.y });
  } else if (event.key === " ") {
    cursor.down = !cursor.down;
    if (cursor.down) begin({ x: cursor.x, y: cursor.y });
    else stroke = null;
    announce(cursor.down ? "Brush down" : "Brush up");
  } else {
    return;
  }
  event.preventDefault();
  showRing(cursor);
}

/** Where a pointer is, in pixels of the image. */
function at(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
}

function showRing({ x, y }) {
  const scale = canvas.clientWidth / canvas.width;
  ring.hidden = false;
  ring.style.width = ring.style.height = `${size.value * scale}px`;
  ring.style.left = `${x * scale}px`;
  ring.style.top = `${y * scale}px`;
}

const colour = () => getComputedStyle(canvas).color;

function copyOf(image, width = image.width, height = image.height) {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [width, height];
  copy.getContext("2d").drawImage(image, 0, 0, width, height);
  return copy;
}

function on(id, action) {
  document.getElementById(id).addEventListener("click", action);
}
