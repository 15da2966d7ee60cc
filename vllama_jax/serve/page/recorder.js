// Recording from camera and microphone.

import { find, showProblem } from "./elements.js";

const kinds = {
  camera: { constraints: { video: true, audio: true }, name: "camera", prefix: "video/" },
  microphone: { constraints: { audio: true }, name: "microphone", prefix: "audio/" },
};

// Open the camera or the microphone, and return the recording as a File; null if it is discarded.
export async function record(kind) {
  const { constraints, name, prefix } = kinds[kind];
  let stream;
  try {
    if (!navigator.mediaDevices) throw new Error("browsers allow it on https:// and localhost only");
    stream = await navigator.mediaDevices.getUserMedia(constraints);
  } catch (error) {
    showProblem(`The ${name} cannot be used: ${error.message}`);
    return null;
  }
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  const viewfinder = find("viewfinder");
  viewfinder.hidden = kind !== "camera";
  viewfinder.srcObject = stream;
  const start = performance.now();
  const timer = setInterval(() => {
    find("elapsed").textContent = `${Math.round((performance.now() - start) / 1000)} s`;
  }, 500);
  recorder.start();
  if (kind === "camera") viewfinder.play();
  find("recorder").showModal();
  const used = await new Promise((resolve) => {
    find("finish-recording").onclick = () => resolve(true);
    find("cancel-recording").onclick = find("recorder").oncancel = () => resolve(false);
  });
  const stopped = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.stop();
  await stopped;
  clearInterval(timer);
  stream.getTracks().forEach((track) => track.stop());
  viewfinder.srcObject = null;
  find("elapsed").textContent = "0 s";
  find("recorder").close();
  if (!used) return null;
  const type = (recorder.mimeType || `${prefix}webm`).split(";")[0];
  const time = new Date().toLocaleTimeString().replaceAll(":", ".");
  return new File(parts, `${name} ${time}.${type.split("/")[1]}`, { type });
}
