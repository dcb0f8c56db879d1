// The one place that knows how the service writes a prediction down.

/** How many classes are asked for. */
export const TOP = 20;

/**
 * A prediction of POST /v1/classify in the page's own words: `shares` maps class names to probabilities, `least` is
 * more than that of any class that is not in it, and the percentile is a share from 0 to 1.
 */
export function prediction(json) {
  return {
    ...opinion(json),
    bare: opinion(json.bare),
    agree: json.agree,
    distance: json.distance,
    percentile: json.percentile === null ? null : json.percentile / 100,
    abstained: json.abstained,
    neighbors: json.neighbors.map((one) => ({ ...one, index: one.class_index })),
  };
}

function opinion(json) {
  const shares = new Map(json.top.map((one) => [one.class, one.probability]));
  return {
    class: json.class,
    index: json.class_index,
    probability: json.probability,
    shares,
    least: Math.min(...shares.values()),
  };
}
