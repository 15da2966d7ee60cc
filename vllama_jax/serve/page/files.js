// Files of a conversation: upload, what the model takes of them, and their cards.

import { preview, upload } from "./api.js";
import { button, element, find, showProblem, showStatus } from "./elements.js";
import { readSampling } from "./settings.js";

let pending = []; // files that the next question is about

export const pendingFiles = () => pending;

export function clearPending() {
  pending = [];
  find("attachments").replaceChildren();
}

// Upload files, show what the model takes of each, and add them to the next question.
export async function addFiles(files) {
  showProblem("");
  for (const file of files) {
    showStatus(`Reading ${file.name} …`);
    try {
      const added = { id: await upload(file), name: file.name, card: element("li", { className: "file" }) };
      await showFile(added);
      pending.push(added);
      find("attachments").append(added.card);
    } catch (error) {
      showProblem(`${file.name}: ${error.message}`);
    }
  }
  showStatus("");
}

// Show what the model takes of files with the present settings.
export async function refreshFiles(files) {
  for (const file of files) {
    try {
      await showFile(file);
    } catch (error) {
      showProblem(`${file.name}: ${error.message}`);
    }
  }
}

async function showFile(file) {
  Object.assign(file, await preview(file.id, readSampling()));
  const remove = button("Remove", () => {
    pending = pending.filter((other) => other !== file);
    file.card.remove();
    find("question").focus();
  });
  remove.setAttribute("aria-label", `Remove ${file.name}`);
  remove.className = "remove";
  file.card.replaceChildren(
    element("header", {}, element("h3", {}, file.name), remove),
    element("p", { className: "quiet" }, file.summary),
  );
  if (file.frames.length) file.card.append(makeStrip("Frames that the model sees", "frames", file.frames, "frame"));
  if (file.clips.length) file.card.append(makeStrip("Spectrograms that the model hears", "sounds", file.clips, "audio clip"));
}

function makeStrip(label, kind, images, what) {
  const strip = element("div", { className: `strip ${kind}`, role: "group", tabIndex: 0, "aria-label": label });
  images.forEach(({ seconds, image }, number) => {
    const time = seconds === null ? "" : `${seconds.toFixed(1)} s`;
    const alt = `${what} ${number + 1} of ${images.length}${time && ` at ${time}`}`;
    strip.append(element("figure", {}, element("img", { src: image, alt }), element("figcaption", {}, time)));
  });
  return strip;
}

// Show the shares of attention of each frame and audio clip below them; none without shares.
export function showShares(file, shares) {
  for (const [kind, values] of [["frames", shares?.frames], ["sounds", shares?.clips]]) {
    const largest = Math.max(...(values ?? []), 0);
    file.card.querySelectorAll(`.${kind} figure`).forEach((figure, number) => {
      figure.querySelector(".share")?.remove();
      if (!values?.length) return;
      const percent = Math.round(100 * values[number]);
      const bar = element("span", { className: "share", title: `${percent} %` });
      bar.style.setProperty("--share", `${largest ? (100 * values[number]) / largest : 0}%`);
      figure.append(bar);
    });
  }
}

// Describe the shares of a file in words, for those who do not see the bars.
export function describeShares(file, shares) {
  const most = (values, images, what) => {
    if (!values.length) return "";
    const number = values.indexOf(Math.max(...values));
    const { seconds } = images[number];
    return `mostly ${what} ${number + 1}${seconds === null ? "" : ` at ${seconds.toFixed(1)} s`}, ${Math.round(100 * values[number])} %`;
  };
  const parts = [most(shares.frames, file.frames, "frame"), most(shares.clips, file.clips, "sound")].filter(Boolean);
  return parts.length ? `${file.name}: ${parts.join("; ")}` : "";
}
