"use strict";
// Everything that came from a person or the server is set as text, never as markup.

const at = (id) => document.getElementById(id);
const STRANGE = 0.995; // doubt from which a text is unlike the usual ones, as the commands have it
const WEAKEST = 0.3; // shade of the weakest word
const SHOWN_CLASSES = 6;
const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1%" : PERCENT.format(share));
const state = { models: [], chosen: null, file: null, language: "curl", asked: 0, before: null };

function made(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

const address = (path) => new URL(path, document.baseURI).href;
const isImage = () => state.chosen !== null && state.chosen.kind === "image";
const newest = () => !state.chosen || (state.chosen.first && state.chosen.name === "rekd");

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (at("key").value) headers.set("Authorization", `Bearer ${at("key").value}`);
  let response;
  try {
    response = await fetch(address(path), { ...options, headers });
  } catch {
    throw { title: "This server does not answer", detail: "Is it still running? Try again." };
  }
  const body = await response.json().catch(() => ({ title: `Status ${response.status}`, detail: "No reason was given." }));
  if (response.status === 401) at("key-row").hidden = false;
  if (!response.ok) throw body;
  return body;
}

function complain(problem) {
  const box = made("div", undefined, "problem");
  box.append(made("strong", problem.title || "It did not work"), made("p", problem.detail || String(problem)));
  at("alert").replaceChildren(box);
  at("empty").hidden = at("answer").hidden = true;
}

// What is served

function nameOf(model) {
  const budget = model.budget === null ? "" : `, up to ${percent(model.budget)} of the ${model.kind === "image" ? "patches" : "words"}`;
  return `${model.name}, version ${model.version}${budget}`;
}

async function learn() {
  let found;
  try {
    found = await call("v1/models");
  } catch (problem) {
    at("version-shown").textContent = "";
    complain(problem);
    if (!at("key-row").hidden) at("key").focus();
    return;
  }
  at("alert").replaceChildren();
  at("empty").hidden = !at("answer").hidden;
  const before = at("version").value;
  state.models = found.models.flatMap((model) => model.versions.map((version, number) => ({ ...model, version, first: number === 0 })));
  at("version").replaceChildren(...state.models.map((model, index) => {
    const option = made("option", nameOf(model));
    option.value = String(index);
    return option;
  }));
  if (before && state.models[Number(before)]) at("version").value = before;
  const several = state.models.length > 1;
  at("version-label").hidden = !several;
  at("version-shown").hidden = several;
  at("version-shown").textContent = state.models.length ? nameOf(state.models[0]) : "no model is served";
  choose();
}

function choose() {
  state.chosen = state.models[Number(at("version").value || 0)] || null;
  at("text-part").hidden = at("windows-part").hidden = isImage();
  at("image-part").hidden = !isImage();
  at("hint").hidden = isImage();
  showCode();
}

// A request and its answer

async function ask() {
  if (state.chosen === null) await learn();
  if (state.chosen === null) return;
  const text = at("text").value;
  const image = isImage();
  if (image && !state.file) return complain({ title: "There is no image", detail: "Choose, drop or paste one." });
  if (!image && !text.trim()) {
    at("text").focus();
    return complain({ title: "There is no text", detail: "Give at least one word." });
  }
  const options = { method: "POST" };
  if (image) {
    options.body = new FormData();
    options.body.append("image", state.file);
    for (const [name, value] of Object.entries(which())) options.body.append(name, value);
  } else {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify({ texts: [text], ...which(), ...(at("windows").checked ? { windows: true } : {}) });
  }
  const number = ++state.asked;
  at("send").disabled = true;
  at("answer").classList.add("busy");
  try {
    const found = await call("v1/predict", options);
    if (number === state.asked) await show(found, found.answers[0], image ? state.file : text);
    if (matchMedia("(max-width: 56rem)").matches) at("answer-title").scrollIntoView({ block: "start" });
  } catch (problem) {
    complain(problem);
  }
  at("send").disabled = false;
  at("answer").classList.remove("busy");
}

const which = () => (newest() ? {} : { model: state.chosen.name, ...(state.chosen.first ? {} : { version: state.chosen.version }) });

// 0.3 for the weakest to 1 for the strongest
function strengths(parts) {
  const scores = parts.map((part) => part.score);
  const low = Math.min(...scores), high = Math.max(...scores);
  return scores.map((score) => (high === low ? 1 : WEAKEST + ((1 - WEAKEST) * (score - low)) / (high - low)));
}

async function show(found, answer, input) {
  const image = answer.boxes !== undefined;
  const parts = image ? answer.boxes : answer.spans;
  at("alert").replaceChildren();
  at("empty").hidden = true;
  at("answer").hidden = false;
  at("verdict").replaceChildren(made("strong", answer.label), made("span", percent(answer.probability)));
  showClasses(answer.probabilities);
  const notes = [];
  if (answer.truncated) notes.push("The text is longer than the model reads; its end was cut. “Read a long text whole” reads all of it.");
  if (answer.doubt !== null && answer.doubt > STRANGE) notes.push("Doubtful: the text is unlike those that the model has learnt from.");
  at("note").textContent = notes.join(" ");
  at("note").hidden = notes.length === 0;
  const what = image ? "patches" : "words";
  at("reason-title").textContent = `The ${what} that decided`;
  at("marked").hidden = image;
  at("picture").hidden = !image;
  if (image) await showImage(input, parts);
  else showText(input, parts);
  const name = (part) => (image ? `row ${part.row + 1}, column ${part.column + 1}` : part.text);
  at("ranked").replaceChildren(...[...parts].sort((one, other) => other.score - one.score).map((part) => {
    const item = made("li", name(part));
    item.append(made("span", `  ${part.score >= 0 ? "+" : "−"}${Math.abs(part.score).toFixed(2)}`, "soft"));
    return item;
  }));
  compare(`${found.model}, version ${found.version}`, input, answer, parts.map(image ? name : (part) => `${part.start} ${part.end}`), what);
  const facts = { read: `${percent(answer.rate)} of the ${image ? "patches" : "words"}`, version: `${found.model} ${found.version}`, request: found.request_id };
  if (answer.doubt !== null) facts.doubt = percent(answer.doubt);
  at("facts").replaceChildren(...Object.entries(facts).map(([term, value]) => {
    const pair = made("div");
    pair.append(made("dt", term), made("dd", value));
    if (term === "doubt") pair.title = "Share of the usual texts whose words are more usual than these";
    return pair;
  }));
  if (state.chosen.first && found.version !== state.chosen.version) learn(); // a new one has taken its place
}

// What another version said of the same input just before
function compare(name, input, answer, parts, what) {
  const before = state.before;
  const other = before !== null && before.input === input && before.name !== name;
  at("compared").hidden = !other;
  if (other) {
    const common = parts.filter((part) => before.parts.includes(part)).length;
    const same = common === parts.length && common === before.parts.length;
    at("compared").textContent = `${before.name} said ${before.label}, ${percent(before.probability)}, from ${same ? `the same ${what}` : `other ${what}`}.`;
  }
  state.before = { name, input, label: answer.label, probability: answer.probability, parts };
}

function showClasses(probabilities) {
  const ranked = Object.entries(probabilities).sort((one, other) => other[1] - one[1]);
  const rows = ranked.slice(0, SHOWN_CLASSES).map(([label, probability]) => {
    const row = made("li"), rail = made("span", undefined, "rail"), bar = made("i"), name = made("span", label, "name");
    bar.style.setProperty("--share", String(probability));
    rail.setAttribute("aria-hidden", "true");
    name.title = label;
    rail.append(bar);
    row.append(name, rail, made("span", percent(probability), "value"));
    return row;
  });
  if (ranked.length > SHOWN_CLASSES) {
    rows.push(made("li"));
    rows.at(-1).append(made("span", `and ${ranked.length - SHOWN_CLASSES} more`, "soft more"));
  }
  at("classes").replaceChildren(...rows);
}

function showText(text, spans) {
  const letters = Array.from(text); // spans count code points, strings of this language do not
  const shades = strengths(spans);
  const pieces = [];
  let end = 0;
  spans.forEach((span, index) => {
    pieces.push(letters.slice(end, span.start).join(""));
    const mark = made("mark", letters.slice(span.start, span.end).join(""));
    mark.style.setProperty("--strength", shades[index].toFixed(3));
    mark.title = `score ${span.score.toFixed(2)}`;
    pieces.push(mark);
    end = span.end;
  });
  at("marked").replaceChildren(...pieces, letters.slice(end).join(""));
}

async function showImage(file, boxes) {
  const canvas = at("picture");
  canvas.setAttribute("aria-label", `The image; ${boxes.length} patches are bright, the others dimmed. They are listed below.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright, as the boxes are
  } catch {
    canvas.hidden = true; // such as TIFF: the list remains
    return;
  }
  const factor = Math.max(1, Math.ceil(480 / Math.max(bitmap.width, bitmap.height)));
  canvas.width = bitmap.width * factor;
  canvas.height = bitmap.height * factor;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = factor === 1;
  const drawn = (brightness, ...places) => { // a filter would do, but Safari has none
    pen.drawImage(bitmap, ...places);
    pen.fillStyle = `rgb(0 0 0 / ${1 - brightness})`;
    pen.fillRect(...places.slice(-4));
  };
  pen.fillStyle = "black"; // where the image is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  drawn(0.3, 0, 0, canvas.width, canvas.height);
  const shades = strengths(boxes);
  const order = boxes.map((_, index) => index).sort((one, other) => shades[one] - shades[other]); // the strongest on top
  const line = Math.max(2, Math.round(Math.max(canvas.width, canvas.height) / 160));
  for (const index of order) {
    const { left, top, right, bottom } = boxes[index];
    const size = [right - left, bottom - top];
    drawn(0.5 + 0.5 * shades[index], left, top, ...size, left * factor, top * factor, size[0] * factor, size[1] * factor);
    pen.strokeStyle = `rgb(255 200 51 / ${shades[index]})`;
    pen.lineWidth = line;
    pen.strokeRect(left * factor + line / 2, top * factor + line / 2, size[0] * factor - line, size[1] * factor - line);
  }
}

// The request as code

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function showCode() {
  const url = address("v1/predict"), key = !at("key-row").hidden;
  const name = state.file ? state.file.name : "image.png";
  const body = { texts: [at("text").value || "A text."], ...which(), ...(at("windows").checked ? { windows: true } : {}) };
  let lines;
  if (state.language === "curl") {
    lines = [`curl ${shell(url)}`];
    if (key) lines.push('  -H "Authorization: Bearer $REKD_API_KEY"');
    if (isImage()) {
      lines.push(`  -F ${shell(`image=@${name}`)}`);
      for (const [field, value] of Object.entries(which())) lines.push(`  -F ${shell(`${field}=${value}`)}`);
    } else {
      lines.push("  -H 'Content-Type: application/json'", `  -d ${shell(JSON.stringify(body))}`);
    }
    lines = [lines.join(" \\\n")];
  } else {
    const python = JSON.stringify(body).replace(/"windows":true/, '"windows": True');
    const headers = key ? ', headers={"Authorization": "Bearer " + os.environ["REKD_API_KEY"]}' : "";
    const what = isImage()
      ? `files={"image": open(${JSON.stringify(name)}, "rb")}${newest() ? "" : `, data=${JSON.stringify(which())}`}`
      : `json=${python}`;
    lines = [...(key ? ["import os"] : []), "import requests", "", `response = requests.post(${JSON.stringify(url)}, ${what}${headers})`,
      "response.raise_for_status()", 'for answer in response.json()["answers"]:',
      `    print(answer["label"], answer["probability"], answer["${isImage() ? "boxes" : "spans"}"])`];
  }
  at("code").textContent = lines.join("\n");
}

async function copy() {
  try {
    await navigator.clipboard.writeText(at("code").textContent);
    at("copied").textContent = "Copied";
  } catch { // no clipboard without TLS on another machine: it is selected, to be copied by hand
    getSelection().selectAllChildren(at("code"));
    at("copied").textContent = "Selected: press Ctrl + C";
  }
  setTimeout(() => { at("copied").textContent = ""; }, 4000);
}

function take(file) {
  if (!file || !isImage()) return;
  state.file = file;
  at("file-name").replaceChildren(made("strong", file.name));
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(file);
  at("preview").hidden = false;
  showCode();
  ask();
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("text").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); } });
for (const id of ["text", "windows"]) at(id).addEventListener("input", showCode);
at("key").addEventListener("change", learn);
at("version").addEventListener("change", () => {
  const kind = state.chosen.kind;
  choose();
  if (!at("answer").hidden && state.chosen.kind === kind) ask(); // the two are compared
});
at("file").addEventListener("change", () => take(at("file").files[0]));
for (const language of ["curl", "python"]) {
  at(`as-${language}`).addEventListener("click", () => {
    state.language = language;
    for (const each of ["curl", "python"]) at(`as-${each}`).setAttribute("aria-pressed", String(each === language));
    showCode();
  });
}
at("copy").addEventListener("click", copy);
addEventListener("dragover", (event) => { event.preventDefault(); at("image-part").classList.add("over"); });
addEventListener("dragleave", () => at("image-part").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); at("image-part").classList.remove("over"); take(event.dataTransfer.files[0]); });
addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files[0]); });
at("preview").addEventListener("error", () => { at("preview").hidden = true; }); // what this browser cannot show
learn();
