// The models of stages 4, 6 and 7 in plain JavaScript, one token at a time, as in their model.py.
"use strict";

/** Numbers from base64: bytes of a Float32Array or an Int8Array. */
function decode(text, Type) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Type(bytes.buffer);
}

/** Float32 weights of an exported tensor. A matrix has 8-bit codes and a scale for each row. */
function weights({ shape, codes, scales, floats }) {
  if (floats) return decode(floats, Float32Array);
  const small = decode(codes, Int8Array), scale = decode(scales, Float32Array);
  const columns = shape[shape.length - 1];
  return Float32Array.from(small, (code, i) => code * scale[Math.floor(i / columns)]);
}

/** matrix (rows, columns) times vector (columns): (rows). */
function product(matrix, vector) {
  const columns = vector.length, result = new Float32Array(matrix.length / columns);
  for (let row = 0, at = 0; row < result.length; row++) {
    let sum = 0;
    for (let i = 0; i < columns; i++) sum += matrix[at++] * vector[i];
    result[row] = sum;
  }
  return result;
}

function dot(a, b) {
  return a.reduce((sum, number, i) => sum + number * b[i], 0);
}

function addTo(x, y, factor = 1) {
  for (let i = 0; i < x.length; i++) x[i] += factor * y[i];
}

function rmsNorm(x, weight, eps) {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((number, i) => number * scale * weight[i]);
}

function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((score) => Math.exp(score - largest));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / total);
}

/** Rotates the pairs (i, i + width / 2) of one head by the angles of a position, in place. */
function rotate(head, position, theta) {
  const half = head.length / 2;
  for (let i = 0; i < half; i++) {
    const angle = position / theta ** (i / half), cos = Math.cos(angle), sin = Math.sin(angle);
    const [a, b] = [head[i], head[i + half]];
    head[i] = a * cos - b * sin;
    head[i + half] = b * cos + a * sin;
  }
}

/** A vector cut into parts of equal width. The parts share its memory. */
function heads(x, width) {
  return Array.from({ length: x.length / width }, (_, i) => x.subarray(i * width, (i + 1) * width));
}

class Model {
  constructor({ config, characters, tensors }) {
    this.config = config;
    this.characters = Array.from(characters);
    this.tensors = Object.fromEntries(Object.entries(tensors).map(([name, t]) => [name, weights(t)]));
    this.reset();
  }

  /** Forgets the text so far. */
  reset() {
    this.position = 0;
    this.cache = Array.from({ length: this.config.n_layer }, () => []); // by layer: {keys, values} of a token
  }

  get(layer, name) {
    return this.tensors[`model.layers.${layer}.${name}`];
  }

  /** One more token: {logits, attention: [layer][head] -> by key, experts: [layer] -> [[expert, weight]]}. */
  step(token) {
    const { n_embd, n_layer, norm_eps } = this.config, seen = { attention: [], experts: [] };
    const embedding = this.tensors["model.embed_tokens.weight"];
    const x = embedding.slice(token * n_embd, (token + 1) * n_embd);
    for (let layer = 0; layer < n_layer; layer++) {
      addTo(x, this.attend(layer, rmsNorm(x, this.get(layer, "input_layernorm.weight"), norm_eps), seen));
      const normed = rmsNorm(x, this.get(layer, "post_attention_layernorm.weight"), norm_eps);
      const isMixture = this.get(layer, "mlp.gate.weight");
      addTo(x, isMixture ? this.mixture(layer, normed, seen) : this.mlp(layer, normed));
    }
    this.position++;
    const logits = product(embedding, rmsNorm(x, this.tensors["model.norm.weight"], norm_eps));
    return { logits, ...seen };
  }

  attend(layer, x, seen) {
    const { n_head, block_size } = this.config;
    const { queries, keys, values } = this.get(layer, "self_attn.kv_b_proj.weight")
      ? this.latentHeads(layer, x)
      : this.groupedHeads(layer, x);
    const cache = this.cache[layer], group = n_head / keys.length;
    cache.push({ keys, values });
    if (cache.length > block_size) cache.shift(); // a window: no distance is larger than in training
    const result = new Float32Array(n_head * values[0].length), outputs = heads(result, values[0].length);
    seen.attention.push(queries.map((query, h) => {
      const shared = Math.floor(h / group), scale = query.length ** -0.5;
      const shares = softmax(Float32Array.from(cache, (past) => dot(query, past.keys[shared]) * scale));
      cache.forEach((past, t) => addTo(outputs[h], past.values[shared], shares[t]));
      return shares;
    }));
    return product(this.get(layer, "self_attn.o_proj.weight"), result);
  }

  /** Stages 4 and 6: query heads share key/value heads. */
  groupedHeads(layer, x) {
    const width = this.config.n_embd / this.config.n_head;
    const [queries, keys, values] = ["q_proj", "k_proj", "v_proj"].map(
      (name) => heads(product(this.get(layer, `self_attn.${name}.weight`), x), width));
    for (const head of [...queries, ...keys]) rotate(head, this.position, this.config.rope_theta);
    return { queries, keys, values };
  }

  /** Stage 7: keys and values come from a latent; a part of each key is rotated and shared by all heads. */
  latentHeads(layer, x) {
    const { kv_lora_rank, qk_nope_head_dim: nope, qk_rope_head_dim, v_head_dim, rope_theta } = this.config;
    const queries = heads(product(this.get(layer, "self_attn.q_proj.weight"), x), nope + qk_rope_head_dim);
    const down = product(this.get(layer, "self_attn.kv_a_proj_with_mqa.weight"), x);
    const norm = this.get(layer, "self_attn.kv_a_layernorm.weight"), rotated = down.subarray(kv_lora_rank);
    const latent = rmsNorm(down.subarray(0, kv_lora_rank), norm, 1e-6);
    for (const part of [rotated, ...queries.map((query) => query.subarray(nope))]) {
      rotate(part, this.position, rope_theta);
    }
    const up = heads(product(this.get(layer, "self_attn.kv_b_proj.weight"), latent), nope + v_head_dim);
    const keys = up.map((head) => Float32Array.of(...head.subarray(0, nope), ...rotated));
    return { queries, keys, values: up.map((head) => head.subarray(nope)) };
  }

  mlp(layer, x, name = "mlp") {
    const projection = (part) => this.get(layer, `${name}.${part}_proj.weight`);
    const [gate, up, down] = ["gate", "up", "down"].map(projection);
    return product(down, gated(product(gate, x), product(up, x)));
  }

  /** The experts with the highest biased scores, weighted by their scores, and the shared experts. */
  mixture(layer, x, seen) {
    const { num_experts_per_tok, n_shared_experts, routed_scaling_factor, n_routed_experts } = this.config;
    const scores = product(this.get(layer, "mlp.gate.weight"), x).map((logit) => 1 / (1 + Math.exp(-logit)));
    const bias = this.get(layer, "mlp.gate.e_score_correction_bias");
    const order = [...scores.keys()].sort((a, b) => scores[b] + bias[b] - scores[a] - bias[a]);
    const chosen = order.slice(0, num_experts_per_tok);
    const total = chosen.reduce((sum, expert) => sum + scores[expert], 0);
    const result = n_shared_experts ? this.mlp(layer, x, "mlp.shared_experts") : new Float32Array(x.length);
    const both = this.get(layer, "mlp.experts.gate_up_proj"), down = this.get(layer, "mlp.experts.down_proj");
    const [bothOf, downOf] = [both, down].map((stacked) => heads(stacked, stacked.length / n_routed_experts));
    seen.experts[layer] = chosen.map((expert) => [expert, scores[expert] / total]);
    for (const [expert, weight] of seen.experts[layer]) {
      const [gate, up] = heads(product(bothOf[expert], x), bothOf[expert].length / x.length / 2);
      addTo(result, product(downOf[expert], gated(gate, up)), weight * routed_scaling_factor);
    }
    return result;
  }
}

/** SwiGLU: silu(gate) · up. */
function gated(gate, up) {
  return gate.map((number, i) => (number / (1 + Math.exp(-number))) * up[i]);
}
