// The explorers' page: one anywidget module, no build step. Python sends a card (facts, JPEG bytes, one byte a patch); this file draws it.
// Texts are set as text nodes only, never as HTML.

const SIZE = { reference: 160, stage: 448 };

// By the widget's kind. steering.js, which the steering panel puts behind this file, adds its own.
const VIEWS = { latent: latentView, patch: patchView };

export default {
  render({ model, el }) {
    const stops = [];
    const page = {
      model,
      get: (name) => model.get(name),
      // One choice, or several at once: set({ name: value, ... }).
      set(name, value) {
        for (const [key, chosen] of Object.entries(typeof name === "string" ? { [name]: value } : name)) model.set(key, chosen);
        model.save_changes();
      },
      on(names, call) {
        for (const name of names) {
          model.on(`change:${name}`, call);
          stops.push(() => model.off(`change:${name}`, call));
        }
      },
    };
    // Jupyter leaves keys alone inside such an element.
    const root = h("section", { class: `psx psx-${page.get("kind")}`, "data-lm-suppress-shortcuts": "true" });
    stops.push(VIEWS[page.get("kind")](page, root));
    el.append(root);
    return () => {
      stops.forEach((stop) => stop());
      root.remove();
    };
  },
};

// -- the latent explorer -------------------------------------------------------------------------------------------------------

function latentView(page, root) {
  const sort = select(page, "sort", "Sort by", { frequency: "frequency", mean_activation: "mean activation", label_entropy: "label entropy" });
  const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Latent, in the chosen order" });
  const number = h("input", { type: "number", min: 0, step: 1, "aria-label": "Latent, by its index" });
  const place = h("output", { class: "psx-soft" });
  const title = h("h3", { "aria-live": "polite" });
  const facts = h("dl", { class: "psx-facts" });
  const scatter = h("canvas", { class: "psx-scatter", role: "img" });
  const classes = h("ol", { class: "psx-bars", "aria-label": "Classes that activate this latent most" });
  const references = referencesOf(page, "Reference images, strongest first");
  const legend = legendOf(page);
  const body = h(
    "div",
    { class: "psx-body" },
    h(
      "div",
      { class: "psx-side" },
      h("div", {}, title, facts),
      h("div", {}, h("h4", {}, "Among all latents"), scatter, h("div", { class: "psx-axis" }, h("span", {}, "rare"), h("span", {}, "→ frequency, ↑ activation"), h("span", {}, "common"))),
      h("div", {}, h("h4", {}, "Classes, share of its active tokens"), classes),
    ),
    references.element,
  );
  root.append(
    h("div", { class: "psx-bar" }, sort, h("label", { class: "psx-grow" }, "Latent", slider), number, place),
    h("div", { class: "psx-bar" }, ...controls(page), legend.element),
    body,
  );

  let order = new Uint32Array();
  let card = null;

  function readOrder() {
    order = new Uint32Array(bytes(page.get("order")).slice().buffer);
    slider.max = Math.max(0, order.length - 1);
    showSelection();
  }
  function showSelection() {
    const latent = page.get("latent");
    const rank = order.indexOf(latent);
    if (rank >= 0) slider.value = rank;
    if (document.activeElement !== number || Number(number.value) !== latent) number.value = latent < 0 ? "" : latent;
    place.textContent = rank < 0 ? "" : `${rank + 1} of ${order.length}`;
    slider.setAttribute("aria-valuetext", rank < 0 ? "none" : `latent ${latent}, ${rank + 1} of ${order.length} by ${page.get("sort").replace("_", " ")}`);
    body.classList.toggle("psx-busy", (card?.latent ?? -1) !== latent);
    drawScatter(scatter, bytes(page.get("points")), latent);
  }
  async function showCard() {
    const next = page.get("shown");
    if (!(await references.show(next))) return; // overtaken by a later card
    card = next;
    title.textContent = next.latent < 0 ? "No latent chosen" : `Latent ${next.latent}${next.name ? ` · ${next.name}` : ""}`;
    facts.replaceChildren(...next.facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    scatter.setAttribute("aria-label", `Each latent by frequency and mean activation; the chosen one is marked. ${next.facts.map((f) => f.join(" ")).join(", ")}`);
    const most = next.classes[0]?.[1] ?? 1;
    classes.replaceChildren(
      ...next.classes.map(([name, share]) => h("li", {}, h("b", { title: name }, name), fill(share / most), h("i", {}, `${Math.round(100 * share)} %`))),
    );
    legend.show(next.scale);
    showSelection();
  }

  slider.addEventListener("input", () => order.length && page.set("latent", order[Number(slider.value)]));
  number.addEventListener("change", () => {
    const latent = Number(number.value);
    if (number.value !== "" && Number.isInteger(latent) && latent >= 0 && latent < page.get("n_latents")) page.set("latent", latent);
    else number.value = page.get("latent");
  });
  scatter.addEventListener("click", (event) => {
    const latent = nearestPoint(scatter, bytes(page.get("points")), event);
    if (latent >= 0) page.set("latent", latent);
  });
  number.max = page.get("n_latents") - 1;
  page.on(["order"], readOrder);
  page.on(["latent"], showSelection);
  page.on(["shown"], showCard);
  const watch = new ResizeObserver(() => drawScatter(scatter, bytes(page.get("points")), page.get("latent")));
  watch.observe(scatter);
  readOrder();
  showCard();
  return () => {
    watch.disconnect();
    references.close();
  };
}

// A latent's strongest images as buttons; a click chooses the image.
function referencesOf(page, heading) {
  const grid = h("div", { class: "psx-refs", role: "group", "aria-label": heading });
  const note = h("p", { class: "psx-soft" });
  const decoder = decoding();
  const tiles = [];
  let scale = 1;
  const mark = () => tiles.forEach((tile) => tile.element.setAttribute("aria-pressed", tile.image === page.get("image")));
  const repaint = () => {
    const look = lookOf(page, scale);
    for (const tile of tiles) paint(tile.canvas, SIZE.reference, tile.picture, tile.codes, look);
  };
  page.on(["image"], mark);
  page.on(["tau", "opacity", "mode"], repaint);
  return {
    element: h("div", {}, h("h4", {}, heading), grid, note),
    async show(next) {
      const pictures = await decoder(next.images.map((image) => image.jpeg));
      if (!pictures) return false;
      scale = next.scale;
      note.textContent = next.note;
      resize(grid, tiles, next.images.length, () => {
        const tile = { canvas: h("canvas", { "aria-hidden": "true" }), name: h("b"), value: h("i") };
        const choose = () => page.set("image", tile.image);
        tile.element = h("button", { class: "psx-ref", type: "button", onclick: choose }, tile.canvas, h("span", {}, tile.name, tile.value));
        return tile;
      });
      const codes = bytes(next.heats);
      const step = codes.length / Math.max(1, next.images.length);
      tiles.forEach((tile, i) => {
        const { index, label, value } = next.images[i];
        Object.assign(tile, { image: index, picture: pictures[i], codes: codes.subarray(i * step, (i + 1) * step) });
        tile.name.textContent = label;
        tile.value.textContent = value;
        tile.element.title = `Image ${index}: ${label}`;
        const where = strongest(tile.codes, page.get("grid"));
        tile.element.setAttribute("aria-label", `Reference image ${i + 1}: ${label}, image ${index}, mean activation ${value}${where}`);
      });
      mark();
      repaint();
      return true;
    },
    close: decoder.close,
  };
}

// A point a latent, from two bytes each (0 0: dead). Mid-grey shows on light and dark pages alike.
function drawScatter(canvas, points, chosen) {
  const { width, height } = fit(canvas);
  const context = canvas.getContext("2d");
  const at = (i) => [6 + ((points[2 * i] - 1) / 254) * (width - 12), height - 6 - ((points[2 * i + 1] - 1) / 254) * (height - 12)];
  context.clearRect(0, 0, width, height);
  context.fillStyle = "rgba(128, 128, 128, 0.35)";
  for (let i = 0; i < points.length / 2; i++) {
    if (!points[2 * i]) continue;
    const [x, y] = at(i);
    context.fillRect(x - 1, y - 1, 2, 2);
  }
  if (chosen >= 0 && points[2 * chosen]) {
    const [x, y] = at(chosen);
    context.beginPath();
    context.arc(x, y, 5, 0, 2 * Math.PI);
    context.fillStyle = "#e69f00";
    context.fill();
    context.strokeStyle = "#1a1a1a";
    context.lineWidth = 1.5;
    context.stroke();
  }
}

function nearestPoint(canvas, points, event) {
  const box = canvas.getBoundingClientRect();
  const x = 1 + (254 * (event.clientX - box.left - 6)) / (box.width - 12);
  const y = 1 + (254 * (box.bottom - 6 - event.clientY)) / (box.height - 12);
  let best = -1;
  let least = Infinity;
  for (let i = 0; i < points.length / 2; i++) {
    if (!points[2 * i]) continue;
    const distance = ((points[2 * i] - x) * box.width) ** 2 + ((points[2 * i + 1] - y) * box.height) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

// -- the patch explorer --------------------------------------------------------------------------------------------------------

function patchView(page, root) {
  const [rows, columns] = page.get("grid");
  const number = h("input", { type: "number", min: 0, max: page.get("n_images") - 1, step: 1, "aria-label": "Image, by its index" });
  const weighed = page.get("has_summary") ? { distinctive: "distinctiveness" } : {};
  const rank = select(page, "rank", "List by", { activation: "activation", ...weighed });
  const back = h("button", { class: "psx-step", type: "button", "aria-label": "Earlier images" }, "‹");
  const forth = h("button", { class: "psx-step", type: "button", "aria-label": "Further images" }, "›");
  const thumbs = h("div", { class: "psx-thumbs", role: "group", "aria-label": "Images" });
  const stage = h("canvas", { class: "psx-stage", tabindex: 0, role: "application", "aria-roledescription": "grid of patches" });
  const title = h("h3");
  const hint = h("p", { class: "psx-status" }, "Click a patch, or move it with the arrow keys. Escape takes the choice back.");
  const live = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const chosen = h("h3");
  const most = h("p", { class: "psx-soft" });
  const references = referencesOf(page, "Its strongest images in the data set");
  const here = listOf(page, "This patch");
  const whole = listOf(page, "Whole image");
  const legend = legendOf(page);
  const body = h(
    "div",
    { class: "psx-body" },
    h("div", {}, title, stage, hint, live),
    h("div", { class: "psx-side" }, h("div", { class: "psx-lists" }, here.element, whole.element), h("div", {}, chosen, most), references.element),
  );
  root.append(
    h("div", { class: "psx-bar" }, h("label", {}, "Image", number), h("div", { class: "psx-shelf" }, back, thumbs, forth)),
    h("div", { class: "psx-bar" }, rank, ...controls(page), legend.element),
    body,
  );

  let card = null;
  let picture = null;
  let hovered = -1;
  const tiles = [];
  const decoder = decoding();
  const urls = [];

  async function showCard() {
    const next = page.get("shown");
    const [pictures, arrived] = await Promise.all([decoder([next.jpeg]), references.show(next.references)]);
    if (!pictures || !arrived) return; // overtaken by a later card
    references.element.hidden = !next.references.images.length;
    card = next;
    picture = pictures[0];
    title.textContent = `Image ${next.image} · ${next.label}`;
    here.show(next.patch_latents, next.patch < 0 ? "No patch chosen." : "No latent is active here.");
    whole.show(next.image_latents, "No latent is active.");
    legend.show(next.scale);
    chosen.textContent = next.latent < 0 ? "" : `Latent ${next.latent}${next.name ? ` · ${next.name}` : ""}`;
    most.textContent = next.latent < 0 ? "Choose a latent to see where it is." : `In this image: at most ${next.most} on a patch, ${next.cls} at CLS.`;
    const spot = next.patch < 0 ? "" : `Row ${Math.floor(next.patch / columns) + 1}, column ${(next.patch % columns) + 1}`;
    const top = next.patch_latents[0];
    live.textContent = spot && `${spot}. ${top ? `Strongest: latent ${top.latent}${top.name ? `, ${top.name}` : ""}` : "No latent is active here"}.`;
    stage.setAttribute("aria-label", `Image ${next.image}, ${next.label}. ${spot || "No patch chosen"}. Arrow keys move over ${rows} by ${columns} patches.`);
    showSelection();
  }
  function showSelection() {
    if (document.activeElement !== number || Number(number.value) !== page.get("image")) number.value = page.get("image");
    const stale = card && ["image", "patch", "latent"].some((name) => card[name] !== page.get(name));
    body.classList.toggle("psx-busy", Boolean(stale));
    here.mark(page.get("latent"));
    whole.mark(page.get("latent"));
    for (const tile of tiles) tile.element.setAttribute("aria-current", tile.image === page.get("image"));
    draw();
  }
  function draw() {
    if (!card) return;
    paint(stage, SIZE.stage, picture, card.latent < 0 ? null : bytes(card.heat), lookOf(page, card.scale));
    const context = stage.getContext("2d");
    const side = [stage.width / columns, stage.height / rows];
    outline(context, hovered, side, columns, 1, hovered === page.get("patch"));
    outline(context, page.get("patch"), side, columns, 3);
  }
  function showThumbs() {
    urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
    const list = page.get("thumbs");
    resize(thumbs, tiles, list.length, () => {
      const tile = { img: h("img") };
      tile.element = h("button", { class: "psx-thumb", type: "button", onclick: () => page.set("image", tile.image) }, tile.img);
      return tile;
    });
    tiles.forEach((tile, i) => {
      const url = URL.createObjectURL(new Blob([bytes(list[i].jpeg)], { type: "image/jpeg" }));
      urls.push(url);
      tile.image = list[i].index;
      tile.img.src = url;
      tile.img.alt = `Image ${list[i].index}: ${list[i].label}`;
      tile.element.title = tile.img.alt;
    });
    back.disabled = page.get("page") <= 0;
    forth.disabled = page.get("page") >= page.get("n_pages") - 1;
    showSelection();
  }
  const patchAt = (event) => {
    const box = stage.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    return row * columns + column;
  };

  stage.addEventListener("click", (event) => page.set("patch", patchAt(event)));
  stage.addEventListener("pointermove", (event) => {
    const patch = patchAt(event);
    if (patch !== hovered) {
      hovered = patch;
      draw();
    }
  });
  stage.addEventListener("pointerleave", () => {
    hovered = -1;
    draw();
  });
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    const patch = page.get("patch");
    if (!step) return page.set("patch", -1);
    if (patch < 0) return page.set("patch", Math.floor(rows / 2) * columns + Math.floor(columns / 2));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(patch / columns) + step[0]));
    const column = Math.min(columns - 1, Math.max(0, (patch % columns) + step[1]));
    page.set("patch", row * columns + column);
  });
  number.addEventListener("change", () => {
    const image = Number(number.value);
    if (number.value !== "" && Number.isInteger(image) && image >= 0 && image < page.get("n_images")) page.set("image", image);
    else number.value = page.get("image");
  });
  back.addEventListener("click", () => page.set("page", Math.max(0, page.get("page") - 1)));
  forth.addEventListener("click", () => page.set("page", Math.min(page.get("n_pages") - 1, page.get("page") + 1)));
  page.on(["shown"], showCard);
  page.on(["image", "patch", "latent"], showSelection);
  page.on(["thumbs"], showThumbs);
  page.on(["tau", "opacity", "mode"], draw);
  showThumbs();
  showCard();
  return () => {
    decoder.close();
    references.close();
    urls.forEach((url) => URL.revokeObjectURL(url));
  };
}

// White over black, so that it shows on any picture.
function outline(context, patch, [width, height], columns, thickness, skip = false) {
  if (patch < 0 || skip) return;
  const scale = context.canvas.width / SIZE.stage;
  const box = [(patch % columns) * width, Math.floor(patch / columns) * height, width, height];
  for (const [color, extra] of [["#1a1a1a", 2], ["#ffffff", 0]]) {
    context.strokeStyle = color;
    context.lineWidth = (thickness + extra) * scale;
    context.strokeRect(...box);
  }
}

// Latents as buttons. Rows are kept and filled anew, so that the focus stays where it is.
function listOf(page, heading) {
  const list = h("ol", { "aria-label": `Latents: ${heading.toLowerCase()}` });
  const empty = h("p", { class: "psx-soft" });
  const rows = [];
  return {
    element: h("div", {}, h("h4", {}, heading), list, empty),
    show(latents, nothing) {
      empty.textContent = latents.length ? "" : nothing;
      list.classList.toggle("psx-named", latents.some((l) => l.name));
      const most = Math.max(...latents.map((l) => l.value), 1e-9);
      resize(list, rows, latents.length, () => {
        const row = { number: h("b"), name: h("span"), bar: fill(0), value: h("i") };
        row.button = h("button", { class: "psx-pick", type: "button", onclick: () => page.set("latent", row.latent) }, row.number, h("div", {}, row.name, row.bar), row.value);
        row.element = h("li", {}, row.button);
        return row;
      });
      rows.forEach((row, i) => {
        const { latent, name, value, text } = latents[i];
        row.latent = latent;
        row.number.textContent = latent;
        row.name.textContent = name;
        row.name.title = name;
        row.bar.style.setProperty("--share", value / most);
        row.value.textContent = text;
        row.button.setAttribute("aria-label", `Latent ${latent}${name ? `, ${name}` : ""}, activation ${text}`);
      });
      this.mark(page.get("latent"));
    },
    mark(latent) {
      for (const row of rows) row.button.setAttribute("aria-pressed", row.latent === latent);
    },
  };
}

// -- controls ------------------------------------------------------------------------------------------------------------------

function controls(page) {
  const opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05 });
  const tau = h("input", { type: "number", min: 0, step: 0.1 });
  const show = () => {
    opacity.value = page.get("opacity");
    if (Number(tau.value) !== page.get("tau") || tau.value === "") tau.value = page.get("tau");
  };
  opacity.addEventListener("input", () => page.set("opacity", Number(opacity.value)));
  tau.addEventListener("input", () => tau.value !== "" && Number(tau.value) >= 0 && page.set("tau", Number(tau.value)));
  page.on(["opacity", "tau"], show);
  show();
  return [select(page, "mode", "Show", { spotlight: "spotlight", heat: "heat map" }), h("label", {}, "Opacity", opacity), h("label", {}, "Threshold τ", tau)];
}

function select(page, trait, label, options) {
  const box = h("select", { onchange: () => page.set(trait, box.value) }, ...Object.entries(options).map(([value, text]) => h("option", { value }, text)));
  const show = () => (box.value = page.get(trait));
  page.on([trait], show);
  show();
  return h("label", {}, label, box);
}

// Colours are linear in the activation, a spotlight's brightness in its square root.
function legendOf(page) {
  const bar = h("div", { "aria-hidden": "true" });
  const labels = [h("span", {}, "0"), h("span"), h("span")];
  const element = h("div", { class: "psx-legend" }, bar, h("p", {}, ...labels));
  const color = () => {
    const colors = bytes(page.get("palette"));
    const stop = (i) => {
      const gray = 255 * Math.sqrt(i / 255);
      return `rgb(${page.get("mode") === "heat" ? Array.from(colors.subarray(3 * i, 3 * i + 3)) : [gray, gray, gray]})`;
    };
    bar.style.background = `linear-gradient(90deg, ${Array.from({ length: 16 }, (_, i) => stop(17 * i))})`;
  };
  page.on(["mode", "palette"], color);
  color();
  return {
    element,
    show(scale) {
      element.setAttribute("aria-label", `Colours: activation from 0 to ${short(scale)}`);
      labels[1].textContent = short(scale / 2);
      labels[2].textContent = `${short(scale)} activation`;
    },
  };
}

// -- drawing -------------------------------------------------------------------------------------------------------------------

function lookOf(page, scale) {
  return { scale, grid: page.get("grid"), tau: page.get("tau"), opacity: page.get("opacity"), mode: page.get("mode"), palette: bytes(page.get("palette")) };
}

// A picture and, over it, one byte a patch: activation = scale * (byte / 255)^2. render.py's `overlay` is the same in Python.
function paint(canvas, size, picture, codes, look) {
  const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
  const side = Math.round(size * ratio);
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.drawImage(picture.color, 0, 0, side, side);
  if (!codes) return;
  if (look.mode === "heat") {
    context.globalAlpha = look.opacity;
    context.drawImage(picture.gray, 0, 0, side, side);
    context.globalAlpha = 1;
  }
  const [rows, columns] = look.grid;
  const layer = (paint.layer ??= document.createElement("canvas"));
  layer.width = columns;
  layer.height = rows;
  const pixels = layer.getContext("2d", { willReadFrequently: true });
  const image = pixels.createImageData(columns, rows);
  for (let i = 0; i < codes.length; i++) {
    const root = codes[i] / 255;
    const shown = look.scale * root * root > look.tau;
    if (look.mode === "heat") {
      const color = 3 * Math.round(255 * root * root);
      image.data.set(look.palette.subarray(color, color + 3), 4 * i);
      image.data[4 * i + 3] = shown ? Math.round(255 * look.opacity * root) : 0;
    } else {
      image.data[4 * i + 3] = Math.round(255 * look.opacity * (shown ? 1 - root : 1));
    }
  }
  pixels.putImageData(image, 0, 0);
  context.drawImage(layer, 0, 0, side, side);
}

function strongest(codes, [, columns]) {
  const at = codes.reduce((best, code, i) => (code > codes[best] ? i : best), 0);
  return codes[at] ? `, strongest at row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}` : "";
}

function fit(canvas) {
  const ratio = globalThis.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
  return { width, height };
}

// -- small things --------------------------------------------------------------------------------------------------------------

// JPEG bytes to pictures, in colour and in grey; null when a later call has overtaken this one. The last bitmaps are freed when new ones come.
function decoding() {
  let latest = 0;
  let current = [];
  const decode = async (list) => {
    const mine = ++latest;
    const bitmaps = await Promise.all(list.map((jpeg) => createImageBitmap(new Blob([bytes(jpeg)], { type: "image/jpeg" }))));
    const old = mine === latest ? current : bitmaps;
    if (mine === latest) current = bitmaps;
    old.forEach((bitmap) => bitmap.close());
    return mine === latest ? bitmaps.map((color) => ({ color, gray: grayOf(color) })) : null;
  };
  decode.close = () => {
    latest++;
    current.forEach((bitmap) => bitmap.close());
    current = [];
  };
  return decode;
}

function grayOf(bitmap) {
  const canvas = h("canvas", { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let i = 0; i < image.data.length; i += 4) {
    image.data.fill(0.299 * image.data[i] + 0.587 * image.data[i + 1] + 0.114 * image.data[i + 2], i, i + 3);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function bytes(view) {
  return view instanceof Uint8Array ? view : new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

function short(value) {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(2);
}

function fill(share) {
  const bar = h("div", { class: "psx-fill", "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  return bar;
}

// Keep as many items as needed, in the page and in the array.
function resize(parent, items, count, make) {
  while (items.length > count) items.pop().element.remove();
  while (items.length < count) {
    const item = make();
    items.push(item);
    parent.append(item.element);
  }
}

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
