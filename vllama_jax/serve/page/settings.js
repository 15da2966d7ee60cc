// The settings dialog. The fields have the names of the server's options.

import { readKey, storeKey } from "./api.js";
import { find } from "./elements.js";

const form = () => find("settings").querySelector("form");

let sampled = ""; // what readSampling returned when the dialog was opened

// Call `changed` when the dialog closes after a change. Its argument says whether the API key is another one.
export function setUpSettings(changed) {
  const { key } = form().elements;
  key.value = readKey();
  find("open-settings").onclick = () => {
    sampled = JSON.stringify(readSampling());
    find("settings").showModal();
  };
  find("settings").onclose = () => {
    const isOtherKey = key.value !== readKey();
    storeKey(key.value);
    if (isOtherKey || JSON.stringify(readSampling()) !== sampled) changed(isOtherKey);
  };
}

// Fill the form with the model's defaults.
export function fillSettings(overview) {
  const fields = form().elements;
  fields.num_frames.value = overview.num_frames;
  fields.num_frames.max = overview.max_frames;
  fields.temperature.value = 0;
  fields.max_tokens.value = overview.max_tokens;
  fields.audio.checked = overview.has_audio;
  fields.audio.disabled = !overview.has_audio;
}

// How frames and audio of files are sampled, as requests have it. A rate replaces the number of frames.
export function readSampling() {
  const { num_frames, fps, audio } = form().elements;
  const video = fps.value ? { fps: Number(fps.value) } : num_frames.value ? { num_frames: Number(num_frames.value) } : {};
  return { media_io_kwargs: { video }, mm_processor_kwargs: { use_audio_in_video: audio.checked } };
}

// How answers are decoded, as `v1/chat/completions` takes it.
export function readDecoding() {
  const { temperature, max_tokens } = form().elements;
  const options = { temperature: Number(temperature.value) || 0 };
  return max_tokens.value ? { ...options, max_tokens: Number(max_tokens.value) } : options;
}
