// A brush over a small picture. The server sets `props.value` to {"pictures": [{"id", "src"}], "choose": an id or 0,
// "height", "width", "cell"}; the brush sets it to {"id": of the picture, "strokes": "0110…", a character per pixel}.
const canvas = element.querySelector("canvas");
const board = element.querySelector(".sr-board");
const shelf = element.querySelector(".sr-shelf");
const pen = canvas.getContext("2d");
let pictures = new Map();
let chosen = 0, brush = 2, height = 1, width = 1, cell = 1;
let mask = new Uint8Array(1), undone = [], last = null;

function select(id) {
  chosen = id;
  mask = new Uint8Array(height * width);
  undone = [];
  report();
}

function report() {
  props.value = JSON.stringify({ id: chosen, strokes: mask.join("") });
  show();
}

function show() {
  const image = pictures.get(chosen);
  board.classList.toggle("sr-ready", Boolean(image));
  for (const button of shelf.children) button.setAttribute("aria-pressed", String(Number(button.dataset.id) === chosen));
  if (!image) return;
  const side = Math.round(board.clientWidth * (window.devicePixelRatio || 1)) || 320;
  canvas.width = side;
  canvas.height = Math.round((side * height) / width);
  const scale = canvas.width / width;
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const touched = new Set();
  mask.forEach((on, i) => {
    if (on) touched.add(Math.floor(i / width / cell) * 10000 + Math.floor((i % width) / cell));
  });
  for (const key of touched) {
    const x = (key % 10000) * cell * scale, y = Math.floor(key / 10000) * cell * scale, s = cell * scale;
    pen.fillStyle = "rgba(120, 205, 208, 0.42)";
    pen.fillRect(x, y, s, s);
    pen.strokeStyle = "rgba(214, 243, 244, 0.9)";
    pen.lineWidth = Math.max(1, scale / 6);
    pen.strokeRect(x + pen.lineWidth / 2, y + pen.lineWidth / 2, s - pen.lineWidth, s - pen.lineWidth);
  }
  pen.fillStyle = "rgba(120, 205, 208, 0.75)";
  mask.forEach((on, i) => {
    if (on) pen.fillRect((i % width) * scale, Math.floor(i / width) * scale, scale + 0.5, scale + 0.5);
  });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function dab([x, y]) {
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const inside = Math.floor(x) === column && Math.floor(y) === row;
      if (inside || Math.hypot(column + 0.5 - x, row + 0.5 - y) <= brush) mask[row * width + column] = 1;
    }
  }
}

function stroke(from, to) {
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let i = 0; i <= steps; i++) dab([from[0] + ((to[0] - from[0]) * i) / steps, from[1] + ((to[1] - from[1]) * i) / steps]);
  show();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!pictures.has(chosen) || event.button > 0) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  undone.push(mask.slice());
  last = place(event);
  stroke(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (last === null) return;
  const here = place(event);
  stroke(last, here);
  last = here;
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (last === null) return;
    last = null;
    report();
  });
}

element.querySelector(".sr-tools").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.brush) brush = Number(button.dataset.brush);
  if (button.dataset.do === "undo" && undone.length) mask = undone.pop();
  if (button.dataset.do === "clear") {
    undone.push(mask.slice());
    mask = new Uint8Array(height * width);
  }
  press();
  report();
});
shelf.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) select(Number(button.dataset.id));
});

function press() {
  for (const button of element.querySelectorAll("[data-brush]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.brush) === brush));
  }
}

async function sync() {
  const told = JSON.parse(props.value || "{}");
  if (!told.pictures) return;
  ({ height, width, cell } = told);
  const loaded = new Map();
  for (const { id, src } of told.pictures) {
    const image = pictures.get(id) || new Image();
    if (!image.src) {
      image.src = src;
      await image.decode();
    }
    loaded.set(id, image);
  }
  pictures = loaded;
  shelf.replaceChildren(
    ...told.pictures.map(({ id, src }, i) => {
      const button = document.createElement("button"), picture = document.createElement("img");
      button.type = "button";
      button.dataset.id = id;
      picture.src = src;
      picture.alt = "picture " + (i + 1);
      button.append(picture);
      return button;
    }),
  );
  if (told.choose) select(told.choose);
  else if (pictures.has(chosen)) report();
  else select(told.pictures.length ? told.pictures[0].id : 0);
}

watch("value", sync);
new ResizeObserver(show).observe(board);
press();
sync();
