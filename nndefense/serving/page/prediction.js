// The one place that knows how the service writes a prediction down.

/** How many classes are asked for. */
export const TOP = 20;

/** A function from the service's names of classes to those that people read; of other data sets' names, too. */
export function naming(classes, names) {
  const known = new Map(classes.map((name, number) => [name, names[number]]));
  return (name) => known.get(name) ?? name?.replaceAll("_", " ") ?? null;
}

/**
 * A prediction of POST /v1/classify in the page's own words: `shares` maps class names to probabilities, `least` is
 * more than that of any class that is not in it, and the percentile is a share from 0 to 1. `shown` is of `naming`.
 */
export function prediction(json, shown) {
  return {
    ...opinion(json, shown),
    bare: opinion(json.bare, shown),
    agree: json.agree,
    distance: json.distance,
    percentile: json.percentile === null ? null : json.percentile / 100,
    abstained: json.abstained,
    neighbors: json.neighbors.map((one) => ({ ...one, class: shown(one.class), label: shown(one.label), index: one.class_index })),
  };
}

function opinion(json, shown) {
  const shares = new Map(json.top.map((one) => [shown(one.class), one.probability]));
  return {
    class: shown(json.class),
    index: json.class_index,
    probability: json.probability,
    shares,
    least: Math.min(...shares.values()),
  };
}
