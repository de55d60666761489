"""RWKV-4, 5 and 6 once more, in numpy and float64, one token at a time, from the names in a state dict alone."""

import numpy as np


def sigmoid(u):
    return 1 / (1 + np.exp(-u))


class NumpyRwkv456:
    """`step(token)` returns logits `[V]`. `wkv[layer]` is `[H,V,K]`, for RWKV-4 the sums `[2,A]` with and without v."""

    def __init__(self, state_dict, layout):
        self.z = {name: t.double().numpy() for name, t in state_dict.items()}
        self.version, self.H, self.N = layout.version, layout.n_head, layout.head_size
        shape = (2, layout.dim_att) if self.version == "4.0" else (self.H, self.N, self.N)
        layers = range(layout.n_layer)
        self.wkv = [self.z.get(f"blocks.{i}.att.time_state", np.zeros(shape)).copy() for i in layers]
        self.att_shift = [np.zeros(layout.n_embd) for _ in layers]
        self.ffn_shift = [np.zeros(layout.n_embd) for _ in layers]

    def step(self, token: int) -> np.ndarray:
        x = self._norm(self.z["emb.weight"][token], "blocks.0.ln0")
        for i in range(len(self.wkv)):
            h = self._norm(x, f"blocks.{i}.ln1")
            x = x + self._time_mix(i, h, self.att_shift[i], self._part(i, "att"))
            self.att_shift[i] = h
            h = self._norm(x, f"blocks.{i}.ln2")
            x = x + self._channel_mix(h, self.ffn_shift[i], self._part(i, "ffn"))
            self.ffn_shift[i] = h
        return self.z["head.weight"] @ self._norm(x, "ln_out")

    def _time_mix(self, i, x, before, p):
        decay = p["time_decay"].ravel()
        if self.version == "6.0":
            low_rank = np.tanh((x + (before - x) * p["time_maa_x"].ravel()) @ p["time_maa_w1"]).reshape(5, -1)
            mixed = {}
            for n, z in enumerate("wkvrg"):
                mixed[z] = x + (before - x) * (p[f"time_maa_{z}"].ravel() + low_rank[n] @ p["time_maa_w2"][n])
            decay = decay + np.tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
        else:
            mu = {z: p[f"time_mix_{z}"].ravel() for z in "kvrg" if f"time_mix_{z}" in p}
            mixed = {z: x * m + before * (1 - m) for z, m in mu.items()}
        r, k, v = p["receptance.weight"] @ mixed["r"], p["key.weight"] @ mixed["k"], p["value.weight"] @ mixed["v"]
        decay = np.exp(-np.exp(decay))
        if self.version == "4.0":
            now = np.exp(p["time_first"] + k)
            sums = self.wkv[i]
            y = (sums[0] + now * v) / (sums[1] + now)
            self.wkv[i] = sums * decay + np.exp(k) * np.stack([v, np.ones_like(v)])
            return p["output.weight"] @ (sigmoid(r) * y)

        bonus = p["time_faaaa"] if "time_faaaa" in p else np.exp(p["time_first"])
        decay, bonus = (np.broadcast_to(z.reshape(self.H, -1), (self.H, self.N)) for z in (decay, bonus))
        r, k, v = (z.reshape(self.H, self.N) for z in (r, k, v))
        y = np.empty_like(v)
        for h in range(self.H):
            S = self.wkv[i][h]
            out = S @ r[h] + (r[h] * bonus[h] * k[h]).sum() * v[h]
            self.wkv[i][h] = S * decay[h] + np.outer(v[h], k[h])
            y[h] = (out - out.mean()) / np.sqrt(out.var() + 64e-5)
        y = y.ravel() * p["ln_x.weight"] + p["ln_x.bias"]
        if "g" in mixed:
            gate = p["gate.weight"] @ mixed["g"]
            y = y * gate * sigmoid(gate)
        return p["output.weight"] @ y

    def _channel_mix(self, x, before, p):
        if self.version == "6.0":
            mu = {z: 1 - p[f"time_maa_{z}"].ravel() for z in "kr"}
        else:
            mu = {z: p[f"time_mix_{z}"].ravel() for z in "kr"}
        mixed = {z: x * m + before * (1 - m) for z, m in mu.items()}
        k = np.maximum(p["key.weight"] @ mixed["k"], 0) ** 2
        return sigmoid(p["receptance.weight"] @ mixed["r"]) * (p["value.weight"] @ k)

    def _part(self, i, part):
        start = f"blocks.{i}.{part}."
        return {name.removeprefix(start): t for name, t in self.z.items() if name.startswith(start)}

    def _norm(self, x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * self.z[f"{name}.weight"] + self.z[f"{name}.bias"]
