// The numbers behind the weight temperature: no page, no Gradio. `llm_merge/weights.py` is the same in Python, and
// tests/browser/test_temperature_widget.py compares the two. A row is {name, loss (null: not measured), base}.
const TemperatureMath = (() => {
  const LOWEST = 0.01, HIGHEST = 10, DEFAULT = 5, POINTS = 121, STEPS = 300;

  // softmax(-loss / T). Only differences from the lowest loss are exponentiated, so nothing overflows.
  function softmax(losses, temperature) {
    const lowest = Math.min(...losses);
    const powers = losses.map((loss) => Math.exp(-(loss - lowest) / temperature));
    const total = powers.reduce((sum, power) => sum + power, 0);
    return powers.map((power) => power / total);
  }

  const included = (rows, includeBase) => rows.map((row) => includeBase || !row.base);

  const measured = (rows, uses) => uses.some(Boolean) && rows.every((row, i) => !uses[i] || Number.isFinite(row.loss));

  // One share per row, 0 for a row that is not in the mix; equal shares while a loss is missing.
  function shares(rows, uses, temperature) {
    const places = rows.map((_, i) => i).filter((i) => uses[i]);
    const some = measured(rows, uses)
      ? softmax(places.map((i) => rows[i].loss), temperature)
      : places.map(() => 1 / places.length);
    const all = rows.map(() => 0);
    places.forEach((i, place) => { all[i] = some[place]; });
    return all;
  }

  // Row `index` takes `share`; locked rows keep theirs and the others keep their proportions in what is left.
  function setByHand(before, index, share, locked, uses) {
    const fixed = before.reduce((sum, s, i) => sum + (i !== index && uses[i] && locked[i] ? s : 0), 0);
    const free = before.map((_, i) => i).filter((i) => i !== index && uses[i] && !locked[i]);
    const room = Math.max(0, 1 - fixed);
    const taken = free.length ? Math.min(Math.max(share, 0), room) : room;
    const rest = free.reduce((sum, i) => sum + before[i], 0);
    const after = before.slice();
    after[index] = taken;
    for (const i of free) after[i] = (room - taken) * (rest > 0 ? before[i] / rest : 1 / free.length);
    return after;
  }

  function spread(rows, uses) {
    const losses = rows.filter((row, i) => uses[i] && Number.isFinite(row.loss)).map((row) => row.loss);
    return losses.length > 1 ? Math.max(...losses) - Math.min(...losses) : 0;
  }

  // Where a temperature lies on the log axis, 0 to 1, and back.
  const position = (temperature) =>
    Math.min(1, Math.max(0, Math.log(temperature / LOWEST) / Math.log(HIGHEST / LOWEST)));
  const temperatureAt = (place) => LOWEST * Math.pow(HIGHEST / LOWEST, place);

  // Three digits are enough for a person; the slider step nearest to a marked value takes exactly that value.
  function tidy(temperature, marks) {
    for (const mark of marks) if (Math.abs(position(temperature) - position(mark)) <= 0.5 / STEPS) return mark;
    return Number(temperature.toPrecision(3));
  }

  // [positions, one list of shares per row]: the weights against T that the chart draws.
  function curve(rows, uses) {
    const places = Array.from({ length: POINTS }, (_, k) => k / (POINTS - 1));
    const columns = places.map((place) => shares(rows, uses, temperatureAt(place)));
    return [places, rows.map((_, i) => columns.map((column) => column[i]))];
  }

  const number = (value) => String(Number(value.toPrecision(3)));
  const list = (values, uses) => values.filter((_, i) => uses[i]).map((value) => value.toFixed(2)).join(" / ");

  function sentence(rows, uses, temperature) {
    const names = rows.filter((_, i) => uses[i]).map((row) => row.name);
    if (names.length === 0) return "No model is in the mix yet: choose models first.";
    if (names.length === 1) return `Only ${names[0]} is in the mix: the result is that model.`;
    if (!measured(rows, uses)) return "Nothing is measured yet, so the shares are equal. Measure to let your examples decide, or set them by hand.";
    const apart = spread(rows, uses);
    if (apart < 1e-9) return "The losses are equal, so every temperature gives equal shares.";
    const now = shares(rows, uses, temperature);
    const other = contrast(rows, uses, temperature, apart);
    const then = list(shares(rows, uses, other), uses);
    const first = `At T = ${number(temperature)} ${verdict(rows, now, names.length)}: ${list(now, uses)}.`;
    return then === list(now, uses) ? first : `${first} At ${number(other)}: ${then}.`;
  }

  // 0: all shares are equal. 1: one model has everything.
  const concentration = (values, count) => (Math.max(...values) - 1 / count) / (1 - 1 / count);

  function verdict(rows, values, count) {
    const strength = concentration(values, count);
    const best = rows[values.indexOf(Math.max(...values))].name;
    if (strength < 0.15) return "your examples hardly steer";
    if (strength < 0.5) return "your examples steer a little";
    if (strength < 0.95) return `your examples favour ${best}`;
    return `${best} takes nearly everything`;
  }

  // Another temperature worth comparing with: one where the examples do steer, or LM-Cocktail's default.
  function contrast(rows, uses, temperature, apart) {
    const count = uses.filter(Boolean).length;
    if (concentration(shares(rows, uses, temperature), count) >= 0.5) return DEFAULT;
    const round = Number((apart * 0.4).toPrecision(1));
    return Math.min(HIGHEST, Math.max(LOWEST, round));
  }

  return { LOWEST, HIGHEST, DEFAULT, STEPS, softmax, included, measured, shares, setByHand, spread, position, temperatureAt, tidy,
    curve, number, sentence };
})();
