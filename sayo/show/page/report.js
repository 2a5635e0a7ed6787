// The page of one report. What a model or a data set wrote is only ever text: nodes are made with createElement and
// textContent, and the page's Content-Security-Policy allows this script and no other.
"use strict";

(function () {
  const SVG = "http://www.w3.org/2000/svg";
  const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];
  const LONGEST = 256; // pixels of a map's longest side
  const report = JSON.parse(document.getElementById("report").textContent);
  const byId = (id) => document.getElementById(id);
  const state = { example: 0, token: 0, layer: report.first_layer, opacity: 0.75, held: false };
  let panes = []; // of the example that is shown, one for each policy
  let shown = report.examples.map((_, index) => index); // the examples that the filter lets through
  let announcement = 0;

  // --- small helpers ---------------------------------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children); // strings become text nodes
    return node;
  }

  function drawing(tag, attributes = {}, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
  const verdict = (answer) => (answer.correct ? "✓ right" : "✗ wrong");

  // Characters that show nothing, or that turn the text around them, are written out.
  const UNSEEN = /(?![\t\n])[\p{Default_Ignorable_Code_Point}\p{Cc}\u2028\u2029\ufff9-\ufffb]/gu;
  function visible(text) {
    return text.replace(UNSEEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  }

  // --- maps ------------------------------------------------------------------------------------------------------

  // Attention of a token on every cell: bytes are 255 times the square root of its share of the map's largest value.
  function mapOf(answer, layer, token) {
    if (!answer.bytes) answer.bytes = Uint8Array.from(atob(answer.maps), (c) => c.charCodeAt(0));
    const width = answer.bytes.length / (report.layers.length * answer.tokens.length);
    const start = (layer * answer.tokens.length + token) * width;
    const scale = answer.scales[layer][token];
    return Float64Array.from(answer.bytes.subarray(start, start + width), (level) => scale * (level / 255) ** 2);
  }

  // What each pixel gets of the attention: a cell's value is spread over its area; where cells overlap they add up.
  function density(picture, values, offset, canvas) {
    const zoom = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
    const width = Math.max(1, Math.round(picture.width * zoom)), height = Math.max(1, Math.round(picture.height * zoom));
    canvas.width = width;
    canvas.height = height;
    const sums = new Float64Array(width * height);
    const cells = picture.cells;
    for (let cell = 0; cell < cells.length / 4; cell++) {
      const edge = (number) => Math.round(cells[4 * cell + number] * zoom);
      const left = Math.min(edge(0), width - 1), top = Math.min(edge(1), height - 1);
      const right = clamp(edge(2), left + 1, width), bottom = clamp(edge(3), top + 1, height);
      const value = values[offset + cell] / ((right - left) * (bottom - top));
      for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sums[y * width + x] += value;
    }
    return sums;
  }

  // Red, green and blue of 256 levels of heat.
  const RAMP = Uint8Array.from({ length: 256 * 3 }, (_, index) => {
    const place = (Math.floor(index / 3) / 255) * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
    const [from, to] = [HEAT[low][index % 3], HEAT[low + 1][index % 3]];
    return Math.round(from + (place - low) * (to - from));
  });

  function paint(canvas, sums, most) {
    const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
    for (let index = 0; index < sums.length; index++) {
      const share = sums[index] / most, color = 3 * Math.round(255 * share), at = 4 * index;
      for (let part = 0; part < 3; part++) pixels.data[at + part] = RAMP[color + part];
      pixels.data[at + 3] = 255 * state.opacity * (1 - 0.3 * share);
    }
    context.putImageData(pixels, 0, 0);
  }

  // Where the brightest cell is, in words.
  function placeOf(sums, width, height, most) {
    let x = 0, y = 0, count = 0;
    sums.forEach((sum, index) => {
      if (sum < most) return;
      x += index % width;
      y += Math.floor(index / width);
      count += 1;
    });
    const third = (mean, side) => Math.min(2, Math.floor((3 * (mean / count + 0.5)) / side));
    const words = [["top"], [], ["bottom"]][third(y, height)].concat([["left"], [], ["right"]][third(x, width)]);
    return words.length ? words.join(" ") : "center";
  }

  // --- one policy's pane -----------------------------------------------------------------------------------------

  function regionOf(picture) {
    const svg = drawing("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, "aria-hidden": "true" });
    for (const kind of ["halo", "edge"]) {
      for (const [x1, y1, x2, y2] of picture.boxes)
        svg.append(drawing("rect", { class: kind, x: x1, y: y1, width: x2 - x1, height: y2 - y1 }));
      for (const polygon of picture.polygons)
        svg.append(drawing("polygon", { class: kind, points: polygon.map((point) => point.join(",")).join(" ") }));
    }
    return svg;
  }

  function stageOf(picture, alternative) {
    const canvas = element("canvas", { "aria-hidden": "true" });
    const image = element("img", { class: "picture", src: picture.src, alt: alternative });
    const stage = element("div", { class: "stage" }, image, canvas, regionOf(picture));
    stage.style.setProperty("--ratio", picture.width / picture.height);
    if (picture.mask) stage.append(element("img", { class: "mask", src: picture.mask, alt: "" }));
    return [stage, canvas];
  }

  function tokenOf(answer, pane, index) {
    const text = answer.tokens[index], scored = answer.scored.includes(index);
    const label = `${text.trim() ? visible(text.trim()) : text ? "space" : "part of a character"}, `;
    const node = element("span", {
      class: scored ? "token scored" : "token",
      id: `token-${pane}-${index}`,
      role: "option",
      "data-token": index,
      "aria-selected": "false",
      "aria-label": `${label}entropy ${number(answer.entropies[index])}${scored ? ", scored" : ""}`,
    });
    const lines = visible(text).split("\n");
    lines.forEach((line, place) => {
      if (place) node.append(element("span", { class: "symbol" }, "⏎"), "\n");
      node.append(line);
    });
    if (!text) node.append(element("span", { class: "symbol" }, "·"));
    node.style.setProperty("--share", Math.sqrt(answer.entropies[index] / (report.most_entropy || 1)));
    return node;
  }

  function scoresOf(answer) {
    const list = element("dl", { class: "scores" });
    for (const [label, value] of [
      ["attention", answer.scores.attention], ["format", answer.scores.format],
      ["accuracy", answer.scores.accuracy], ["total reward", answer.scores.total],
      ["TAS, all tokens", answer.scores.tas], ["TAS, scored ones", answer.scores.tas_selected],
    ]) list.append(element("div", {}, element("dt", {}, label), element("dd", {}, number(value))));
    return list;
  }

  function buildPane(example, index) {
    const answer = example.answers[index], name = report.policies[index], count = answer.tokens.length;
    const stages = example.pictures.map((picture, place) => {
      const which = example.pictures.length > 1 ? ` ${place + 1} of ${example.pictures.length}` : "";
      return stageOf(picture, `Picture${which} of the question “${visible(example.question)}”, ${picture.region}`);
    });
    const tokens = element("div", {
      class: "tokens",
      role: "listbox",
      tabindex: "0",
      "aria-orientation": "horizontal",
      "aria-label": `${name}: completion of ${count} tokens, left and right to move`,
    }, ...answer.tokens.map((_, token) => tokenOf(answer, index, token)));
    const strip = drawing("svg", {
      class: "strip", viewBox: `0 0 ${Math.max(1, count)} 1`, preserveAspectRatio: "none", "aria-hidden": "true",
    });
    const where = element("p", { class: "where" });
    const said = answer.answer === null ? "no answer" : `“${visible(answer.answer)}”`;
    const section = element("section", { class: "pane", "aria-labelledby": `name-${index}` },
      element("div", { class: "head" },
        element("h3", { id: `name-${index}` }, name),
        element("span", { class: "said" }, `${said} `,
          element("strong", { class: answer.correct ? "right" : "wrong" }, verdict(answer)))),
      element("div", { class: "pictures" }, ...stages.map(([stage]) => stage)),
      tokens, strip, where, scoresOf(answer)); // the sentence last: its length must not move what is pointed at
    if (answer.truncated)
      tokens.after(element("p", { class: "muted" }, `Cut off after ${count} tokens.`));
    for (const area of [tokens, strip]) followPointer(area, count);
    return { answer, name, section, tokens, strip, where, canvases: stages.map(([, canvas]) => canvas) };
  }

  // Mouse and finger: the token under it, also while a finger slides; on the strip, the bar at its place.
  function followPointer(area, count) {
    const tokenAt = (event) => {
      if (area instanceof SVGElement) {
        const box = area.getBoundingClientRect();
        return count ? clamp(Math.floor((count * (event.clientX - box.left)) / box.width), 0, count - 1) : null;
      }
      const under = document.elementFromPoint(event.clientX, event.clientY);
      const token = under && area.contains(under) && under.closest("[data-token]");
      return token ? Number(token.dataset.token) : null;
    };
    const follow = (event) => {
      const token = tokenAt(event);
      if (token !== null && (!state.held || event.pointerType !== "mouse")) moveTo(token);
    };
    area.addEventListener("pointermove", follow);
    area.addEventListener("pointerdown", follow);
    area.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token === null || event.pointerType === "touch") return;
      hold(!(state.held && token === state.token));
      moveTo(token);
    });
  }

  function hold(held) {
    state.held = held;
    byId("panes").classList.toggle("held", held);
  }

  // --- what the state shows --------------------------------------------------------------------------------------

  function drawStrip(pane, example) {
    const { answer, strip } = pane, shares = answer.on_region[state.layer];
    if (!example.region_share) return strip.remove(); // no region, nothing to compare with
    const most = Math.max(example.region_share, ...shares, 0.05);
    strip.replaceChildren(...shares.map((share, token) => {
      const chosen = answer.scored.includes(token) ? "bar chosen" : "bar";
      return drawing("rect", { class: chosen, x: token + 0.1, width: 0.8, y: 1 - share / most, height: share / most });
    }));
    const even = 1 - example.region_share / most;
    strip.append(drawing("line", { class: "even", x1: 0, x2: Math.max(1, shares.length), y1: even, y2: even }));
    if (state.token < shares.length)
      strip.append(drawing("rect", { class: "now", x: state.token, width: 1, y: 0, height: 1 }));
  }

  function describe(pane, example, place) {
    const { answer } = pane, token = state.token;
    const text = answer.tokens[token].trim(), on = answer.on_picture[state.layer][token];
    let words = `Token ${token + 1} of ${answer.tokens.length}${text ? `, “${visible(text)}”` : ""}. `;
    words += `On the picture: ${percent(on)} of its attention, most at the ${place}. `;
    if (example.region_share) {
      words += `On the region: ${percent(answer.on_region[state.layer][token])} of that; `;
      words += `without a preference it would be ${percent(example.region_share)}. `;
    }
    return `${words}Entropy: ${number(answer.entropies[token])} nats${answer.scored.includes(token) ? ", scored" : ""}.`;
  }

  function drawPane(pane, example) {
    const { answer, tokens } = pane, ended = state.token >= answer.tokens.length;
    for (const token of tokens.querySelectorAll('[aria-selected="true"]')) token.setAttribute("aria-selected", "false");
    drawStrip(pane, example);
    if (ended) {
      tokens.removeAttribute("aria-activedescendant");
      for (const canvas of pane.canvases) canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      const count = answer.tokens.length;
      pane.where.textContent = count ? `This completion has ended after ${count} tokens.` : "This completion is empty.";
      return;
    }
    const current = tokens.children[state.token];
    current.setAttribute("aria-selected", "true");
    tokens.setAttribute("aria-activedescendant", current.id);
    const values = mapOf(answer, state.layer, state.token);
    let offset = 0;
    const parts = example.pictures.map((picture, place) => {
      const sums = density(picture, values, offset, pane.canvases[place]);
      offset += picture.cells.length / 4;
      return sums;
    });
    const peaks = parts.map((sums) => sums.reduce((most, value) => Math.max(most, value), 0));
    const most = Math.max(...peaks), best = peaks.indexOf(most), { width, height } = pane.canvases[best];
    parts.forEach((sums, place) => paint(pane.canvases[place], sums, most || 1));
    const which = parts.length > 1 ? ` of picture ${best + 1}` : "";
    pane.where.textContent = describe(pane, example, placeOf(parts[best], width, height, most) + which);
  }

  function draw() {
    const example = report.examples[state.example], layer = report.layers[state.layer];
    byId("layer-name").textContent = layer;
    byId("layer").setAttribute("aria-valuetext", layer);
    byId("opacity-name").textContent = `${Math.round(100 * state.opacity)} %`;
    for (const pane of panes) drawPane(pane, example);
    clearTimeout(announcement); // a reader hears where the cursor rests, not every place that it passes
    announcement = setTimeout(() => {
      byId("live").textContent = panes.map((pane) => `${pane.name}. ${pane.where.textContent}`).join(" ");
      history.replaceState(null, "", `#${state.example + 1}.${state.token + 1}`); // the address leads back here
    }, 250);
  }

  function moveTo(token) {
    const longest = Math.max(...panes.map((pane) => pane.answer.tokens.length));
    const next = clamp(token, 0, Math.max(0, longest - 1));
    if (next === state.token) return;
    state.token = next;
    draw();
  }

  function showExample(index) {
    const focused = panes.findIndex((pane) => pane.tokens === document.activeElement);
    const example = report.examples[index];
    Object.assign(state, { example: index, token: 0 });
    hold(false);
    byId("question").textContent = visible(example.question);
    byId("expected").textContent = example.choices.map((choice, at) =>
      `${String.fromCharCode(65 + at)}. ${visible(choice)}\n`).join("") + `Answer: ${visible(example.answer)}`;
    panes = example.answers.map((_, place) => buildPane(example, place));
    byId("panes").replaceChildren(...panes.map((pane) => pane.section));
    if (focused >= 0) panes[focused].tokens.focus({ preventScroll: true });
    for (const entry of byId("examples").children) {
      const selected = Number(entry.dataset.example) === index;
      entry.setAttribute("aria-selected", String(selected));
      if (selected) {
        byId("examples").setAttribute("aria-activedescendant", entry.id);
        scrollInside(byId("examples"), entry);
      }
    }
    draw();
  }

  // Into the middle of the list; scrollIntoView would move the page as well.
  function scrollInside(box, entry) {
    const outer = box.getBoundingClientRect(), inner = entry.getBoundingClientRect();
    box.scrollTop += (inner.top + inner.bottom - outer.top - outer.bottom) / 2;
    box.scrollLeft += (inner.left + inner.right - outer.left - outer.right) / 2;
  }

  function stepExample(step) {
    const next = shown[clamp(shown.indexOf(state.example) + step, 0, shown.length - 1)];
    if (next !== undefined && next !== state.example) showExample(next);
  }

  // --- the list of examples --------------------------------------------------------------------------------------

  function entryOf(example, index) {
    const marks = example.answers.map((answer, place) => element("span", { class: answer.correct ? "right" : "wrong" },
      `${answer.correct ? "✓" : "✗"} ${number(answer.scores.tas)}`,
      element("span", { class: "hidden" }, ` ${report.policies[place]} ${verdict(answer)}, TAS`)));
    const entry = element("div", {
      class: "entry", role: "option", id: `entry-${index}`, "data-example": index, "aria-selected": "false",
    }, element("img", { src: example.pictures[0].src, alt: "", loading: "lazy", decoding: "async" }),
      element("span", {}, element("span", { class: "text" }, visible(example.question)),
        element("span", { class: "marks" }, ...marks)));
    entry.addEventListener("click", () => showExample(index));
    return entry;
  }

  // The filters that fit: of one policy, or of two that may differ.
  function filters() {
    const last = report.policies.length - 1;
    const found = [["all", () => true]];
    for (const [place, name] of report.policies.entries()) {
      found.push([`${name} right`, (answers) => answers[place].correct]);
      found.push([`${name} wrong`, (answers) => !answers[place].correct]);
    }
    if (last) {
      found.push(["wrong, then right", (answers) => !answers[0].correct && answers[last].correct]);
      found.push(["right, then wrong", (answers) => answers[0].correct && !answers[last].correct]);
    }
    return found;
  }

  function applyFilter(test) {
    shown = [];
    for (const entry of byId("examples").children) {
      const index = Number(entry.dataset.example);
      entry.hidden = !test(report.examples[index].answers);
      if (!entry.hidden) shown.push(index);
    }
    byId("count").textContent = `${shown.length} of ${report.examples.length}`;
    if (shown.length && !shown.includes(state.example)) showExample(shown[0]);
  }

  // --- start -----------------------------------------------------------------------------------------------------

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const inTokens = panes.some((pane) => pane.tokens === event.target), inList = event.target === byId("examples");
    if (!inTokens && !inList && event.target !== document.body) return; // sliders keep their arrows
    const longest = Math.max(...panes.map((pane) => pane.answer.tokens.length));
    const actions = { Escape: () => hold(false) };
    if (inTokens || inList) Object.assign(actions, { ArrowUp: () => stepExample(-1), ArrowDown: () => stepExample(1) });
    if (inList) Object.assign(actions, { Home: () => stepExample(-shown.length), End: () => stepExample(shown.length) });
    else Object.assign(actions, { ArrowLeft: () => moveTo(state.token - 1), ArrowRight: () => moveTo(state.token + 1) });
    if (inTokens) Object.assign(actions, { Home: () => moveTo(0), End: () => moveTo(longest - 1) });
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  byId("about").textContent = visible(report.about);
  byId("marks").textContent = `Right or wrong, and TAS: ${report.policies.join(", ")}`;
  byId("terms").textContent = visible(report.terms);
  byId("most").textContent = number(report.most_entropy, 1);
  byId("panes").style.setProperty("--columns", report.policies.length);
  const table = element("table");
  for (const [place, row] of report.summary.entries())
    table.append(element("tr", {}, ...row.map((cell) => element(place ? "td" : "th", {}, cell))));
  byId("summary").append(table);
  byId("layer").max = report.layers.length - 1;
  byId("layer").value = state.layer;
  byId("layer").addEventListener("input", (event) => { state.layer = Number(event.target.value); draw(); });
  byId("opacity").addEventListener("input", (event) => { state.opacity = Number(event.target.value) / 100; draw(); });
  byId("region").addEventListener("change", (event) => {
    byId("panes").classList.toggle("no-region", !event.target.checked);
  });
  byId("previous").addEventListener("click", () => stepExample(-1));
  byId("next").addEventListener("click", () => stepExample(1));
  document.addEventListener("keydown", onKey);
  byId("examples").append(...report.examples.map(entryOf));
  const tests = filters();
  byId("filter").append(...tests.map(([name], index) => element("option", { value: index }, name)));
  byId("filter").addEventListener("change", (event) => applyFilter(tests[Number(event.target.value)][1]));
  applyFilter(tests[0][1]);
  const [, example, token] = location.hash.match(/^#(\d+)\.(\d+)$/) || [null, 1, 1];
  showExample(clamp(example - 1, 0, report.examples.length - 1));
  moveTo(token - 1);
})();
