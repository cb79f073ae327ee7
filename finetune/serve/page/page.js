// A call: microphone or recording -> websocket -> loudspeaker, with what Moshi says and learns.

import { Plot } from "./plot.js";

const [HANDSHAKE, AUDIO, , , METADATA] = [0, 1, 2, 3, 4];
const $ = (id) => document.getElementById(id);
const plot = new Plot($("plot"), $("legend"));
const address = new URL(location.href);
let call = null; // the call that goes on
let last = null; // the one that can be downloaded

$("token").value = address.searchParams.get("token") ?? "";
if (address.searchParams.has("token")) {
  // Not in the history, nor in a screenshot of the address.
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function clock(sec) {
  return `${Math.floor(sec / 60)}:${String(Math.floor(sec % 60)).padStart(2, "0")}`;
}

function level(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return Math.min(1, 3 * Math.sqrt(sum / samples.length));
}

function toPcm(samples) {
  const pcm = new Int16Array(samples.length);
  samples.forEach((sample, i) => (pcm[i] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767)));
  return pcm;
}

class Call {
  constructor(made, socket) {
    Object.assign(this, made, { socket, heard: [], said: [], atSec: 0, word: null });
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    socket.onclose = ({ code, reason }) => this.close(reason, code !== 1000 && code !== 1005);
  }

  receive(bytes) {
    const payload = bytes.slice(1);
    if (bytes[0] === AUDIO) this.play(payload);
    if (bytes[0] === METADATA) this.note(JSON.parse(new TextDecoder().decode(payload)));
  }

  note(about) {
    if (about.call) return this.begin(about).catch((error) => this.fail(error));
    this.atSec = about.at_sec;
    $("time").textContent = clock(about.at_sec);
    $("latency").textContent = about.waited_ms.toFixed(0);
    const behindMs = Math.max(0, (this.heard.length - this.said.length) * 80);
    $("queue").textContent = behindMs;
    if (behindMs > 3000 && !this.isSlow) {
      this.isSlow = true;
      say("The model is slower than speech here: answers come later and later.", true);
    }
    if (about.text) this.write(about.text, about.at_sec);
    if (about.changes) plot.add(about.at_sec, about.changes);
  }

  async begin(about) {
    this.about = about;
    plot.begin(about.layers);
    const { context, recorder } = this;
    for (const each of new Set([context, recorder])) await each.audioWorklet.addModule("worklet.js");
    this.player = new AudioWorkletNode(context, "player", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { startSamples: 2 * about.frame_samples },
    });
    this.player.connect(context.destination);
    const capture = new AudioWorkletNode(recorder, "capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      numberOfOutputs: 1,
      processorOptions: { frameSamples: about.frame_samples, rateHz: about.rate_hz },
    });
    capture.port.onmessage = ({ data }) => this.send(data);
    this.source.connect(capture).connect(recorder.destination); // it is silent, but must be pulled
    this.source.start?.();
    $("ttt").checked = about.ttt_on;
    for (const id of ["forget", "ttt"]) $(id).disabled = !about.layers.length;
    for (const id of ["save", "load"]) $(id).disabled = false;
    say("Connected: speak.");
  }

  send(samples) {
    $("user-level").value = level(samples);
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const pcm = toPcm(samples);
    this.heard.push(pcm);
    this.sendMessage(AUDIO, new Uint8Array(pcm.buffer));
  }

  sendMessage(kind, payload) {
    const bytes = new Uint8Array(1 + payload.length);
    bytes[0] = kind;
    bytes.set(payload, 1);
    this.socket.send(bytes);
  }

  ask(what) {
    this.sendMessage(METADATA, new TextEncoder().encode(JSON.stringify(what)));
  }

  play(payload) {
    const pcm = new Int16Array(payload.buffer, 0, payload.length >> 1);
    const samples = Float32Array.from(pcm, (sample) => sample / 32767);
    this.said.push(pcm);
    $("moshi-level").value = level(samples);
    $("download").disabled = false;
    this.player?.port.postMessage(samples, [samples.buffer]);
  }

  write(text, atSec) {
    if (text.startsWith(" ") || !this.word) {
      const line = document.createElement("li");
      const time = document.createElement("time");
      time.textContent = atSec.toFixed(1) + " s";
      this.word = document.createElement("span");
      line.append(time, this.word);
      $("words").append(line);
      if ($("words").children.length > 2000) $("words").firstElementChild.remove();
    }
    this.word.textContent += text.trim();
    $("words").scrollTop = $("words").scrollHeight;
  }

  fail(error) {
    this.failure = error.message;
    this.socket.close(1000);
  }

  close(reason, isError) {
    release(this);
    if (call !== this) return;
    call = null;
    $("call").textContent = "Call";
    for (const id of ["forget", "ttt", "save", "load"]) $(id).disabled = true;
    for (const id of ["user-level", "moshi-level"]) $(id).value = 0;
    const said = this.about ? "The call has ended" : "No call";
    const why = this.failure ?? reason;
    say(why ? `${said}: ${why}.` : `${said}.`, isError || this.failure !== undefined);
  }
}

// Whatever becomes of a call, the browser listens no longer.
function release({ stream, context, recorder }) {
  stream?.getTracks().forEach((track) => track.stop());
  for (const each of new Set([context, recorder])) {
    if (each && each.state !== "closed") each.close();
  }
}

async function open(made) {
  const { context } = made;
  if ($("source").value === "microphone") {
    if (!navigator.mediaDevices) {
      throw new Error("a browser gives the microphone to https or this machine's own pages alone");
    }
    made.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
    });
    // At the device's own rate: Firefox gives a microphone at no other.
    made.recorder = new AudioContext();
    made.source = made.recorder.createMediaStreamSource(made.stream);
    return;
  }
  const [file] = $("recording").files;
  if (!file) throw new Error("choose a recording first");
  const buffer = await context.decodeAudioData(await file.arrayBuffer()).catch(() => {
    throw new Error(`${file.name} is no recording that this browser can read`);
  });
  made.recorder = context;
  made.source = new AudioBufferSourceNode(context, { buffer });
}

function url(path, query = {}) {
  const to = new URL(path, address);
  to.search = "";
  for (const [name, value] of Object.entries(query)) to.searchParams.set(name, value);
  if ($("token").value) to.searchParams.set("token", $("token").value);
  return to;
}

async function begin() {
  say("Connecting …");
  $("words").replaceChildren();
  const made = { context: new AudioContext({ sampleRate: 24000 }) };
  try {
    await open(made);
    const health = await fetch(url("metrics"));
    if (health.status === 401) $("token-label").hidden = false;
    if (!health.ok) throw new Error((await health.text()).trim());
    const to = url("api/chat", { format: "pcm" });
    to.protocol = to.protocol.replace("http", "ws");
    call = last = new Call(made, new WebSocket(to));
    $("call").textContent = "Hang up";
  } catch (error) {
    release(made);
    say(`No call: ${error.message}.`, true);
  }
}

$("call").onclick = async () => {
  if (call) return call.socket.close(1000);
  // A second click would open a second microphone, which nothing closes.
  $("call").disabled = true;
  try {
    await begin();
  } finally {
    $("call").disabled = false;
  }
};
$("source").onchange = () => ($("recording-label").hidden = $("source").value !== "file");
$("forget").onclick = () => call?.ask({ do: "forget" });
$("ttt").onchange = () => call?.ask({ do: "ttt", on: $("ttt").checked });

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

$("save").onclick = async () => {
  const answer = await fetch(url(`api/calls/${call.about.call}/session`, { part: $("part").value }));
  if (!answer.ok) return say((await answer.text()).trim(), true);
  offer(await answer.blob(), "moshi.session");
  say("The session is saved.");
};
$("load").onclick = () => $("session").click();
$("session").onchange = async () => {
  const [file] = $("session").files;
  if (!file || !call) return;
  const answer = await fetch(url(`api/calls/${call.about.call}/session`), { method: "PUT", body: file });
  const text = (await answer.text()).trim();
  say(answer.ok ? `The session goes on (${text}).` : text, !answer.ok);
  $("session").value = "";
};
$("download").onclick = () => offer(stereo(last), "call.wav");

// Left Moshi, right the user, as recordings for training are.
function stereo({ heard, said, about }) {
  const samples = said.length * about.frame_samples;
  const bytes = new DataView(new ArrayBuffer(44 + 4 * samples));
  const text = (at, word) => [...word].forEach((c, i) => bytes.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 4 * samples, true);
  text(8, "WAVEfmt ");
  [16, 1 | (2 << 16), about.rate_hz, 4 * about.rate_hz, 4 | (16 << 16)].forEach((value, i) =>
    bytes.setUint32(16 + 4 * i, value, true),
  );
  text(36, "data");
  bytes.setUint32(40, 4 * samples, true);
  said.forEach((frame, index) => {
    for (let i = 0; i < frame.length; i++) {
      const at = 44 + 4 * (index * about.frame_samples + i);
      bytes.setInt16(at, frame[i], true);
      bytes.setInt16(at + 2, heard[index]?.[i] ?? 0, true);
    }
  });
  return new Blob([bytes], { type: "audio/wav" });
}
