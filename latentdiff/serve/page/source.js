// The image that a task begins from, at the size it is worked on.

import { Problem } from "./protocol.js";
import { sizeMask } from "./mask.js";

const picture = document.getElementById("picture");
const canvases = document.getElementById("canvases");
const choices = document.getElementById("working-size");
const fields = document.getElementById("form").elements;
/** {file, bitmap}: the bitmap is upright, whatever EXIF says. */
let source = null;
let size = { width: 0, height: 0 };
/** The size that the user wants, as "64x48"; "": what suits the task. */
let wanted = "";

export const hasImage = () => source !== null;
export const sourceFile = () => source?.file;
export const workedAt = () => choices.value;

/** Begin from a file.
 *  @param limits {side, keeps, max_pixels, max_body}: see `offerSizes`.  @param at see `wanted`. */
export async function takeImage(file, limits, at = "") {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem("image cannot be shown by this browser. Take a PNG, JPEG, WebP or AVIF file.", "image");
  });
  [source, wanted] = [{ file, bitmap }, at];
  canvases.hidden = document.getElementById("working").hidden = false;
  document.getElementById("source-hint").hidden = true;
  document.getElementById("choose").textContent = "Another image…";
  document.getElementById("mask-tools").hidden = false;
  offerSizes(limits, false);
}

/** The sizes to choose from: those near the model's, and the image's own if the server takes it.
 *  @param limits side: the longest of the model's images; keeps: whether the image's own size is
 *  preferred; max_pixels, max_body: the server's.
 *  @param keep whether the mask stays. */
export function offerSizes({ side, keeps, max_pixels, max_body }, keep = true) {
  if (!source) return;
  const { bitmap: { width, height }, file } = source;
  const longest = Math.max(width, height);
  const most = longest * Math.min(1, Math.sqrt(max_pixels / (width * height)));
  const offered = [1, 2, 4, 8, 16].map((times) => times * side).filter((one) => one < most);
  const sizes = offered.map((one) => [width, height].map((long) => Math.max(1, Math.round((long * one) / longest))));
  const whole = most === longest && file.size * 1.4 < max_body;
  if (whole) sizes.push([width, height]);
  else sizes.push([width, height].map((long) => Math.max(1, Math.floor((long * most * 0.999) / longest))));
  const options = sizes.map(([w, h]) => {
    const own = w === width && h === height ? ", as it is" : "";
    return new Option(`${w} × ${h}${own}`, `${w}x${h}`);
  });
  choices.replaceChildren(...options);
  const again = options.findIndex((option) => option.value === wanted);
  choices.selectedIndex = again >= 0 ? again : keeps ? options.length - 1 : 0;
  choices.onchange = () => {
    wanted = choices.value;
    work(true);
  };
  work(keep);
}

async function work(keepMask) {
  const [width, height] = choices.value.split("x").map(Number);
  if (width !== size.width || height !== size.height || !keepMask) sizeMask(width, height, keepMask);
  size = { width, height };
  await drawSource();
}

/** Show it, in its margins where some are to be added. */
export async function drawSource(task = drawSource.task) {
  drawSource.task = task;
  if (!source) return;
  const { width, height } = size;
  const wide = task === "outpaint";
  const [left, right, top, bottom] = ["left", "right", "top", "bottom"].map((name) =>
    wide ? Math.min(4096, Math.max(0, Number(fields[name].value) || 0)) : 0);
  [picture.width, picture.height] = [width + left + right, height + top + bottom];
  picture.getContext("2d").drawImage(await resized(), left, top, width, height);
  canvases.style.maxWidth = `calc(24rem * ${Math.min(1.6, picture.width / picture.height)})`;
  canvases.classList.toggle("small", Math.max(width, height) <= 128);
}

/** The file as it is where its size is kept, else a PNG. */
export async function sentImage() {
  if (isWhole()) return source.file;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [size.width, size.height];
  canvas.getContext("2d").drawImage(await resized(), 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const isWhole = () => source.bitmap.width === size.width && source.bitmap.height === size.height;

async function resized() {
  if (isWhole()) return source.bitmap;
  const { width, height } = size;
  return createImageBitmap(source.bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
}
