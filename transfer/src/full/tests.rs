use super::*;

fn sequences(lengths: &[usize]) -> Vec<Sequence> {
    let sequence = |&length: &usize| Sequence {
        ids: vec![1; length],
        types: vec![0; length],
        label: None,
        line: 1,
        truncated: false,
        made_up: false,
    };
    lengths.iter().map(sequence).collect()
}

#[test]
fn every_sequence_is_seen_as_often_and_steps_have_like_lengths() {
    let lengths: Vec<usize> = (0..40).map(|at| 2 + at * 7 % 31).collect();
    let all = sequences(&lengths);
    let training: Vec<usize> = (0..40).collect();
    let options = Options { steps: 20, batch: 4, seed: 5, ..Options::default() };
    let made = plan(&training, &all, &options);
    assert_eq!(made.len(), 20);
    let mut seen = vec![0; 40];
    made.iter().flatten().for_each(|&at| seen[at] += 1);
    assert!(seen.iter().all(|&times| times == 2), "{seen:?}");
    let spread = |step: &Vec<usize>| {
        let of = step.iter().map(|&at| lengths[at]);
        of.clone().max().unwrap() - of.min().unwrap()
    };
    assert!(made.iter().all(|step| spread(step) <= 6));
    assert_eq!(plan(&training, &all, &options), made);
    assert_ne!(plan(&training, &all, &Options { seed: 6, ..options }), made);
    let mut all = sequences(&[5; 200]);
    all[..100].iter_mut().for_each(|s| s.made_up = true);
    let (rest, apart) = split((0..200).collect(), &all, 1);
    assert_eq!((rest.len(), apart.len()), (195, 5));
    assert!(apart.iter().all(|at| !rest.contains(at) && *at >= 100), "texts judge");
    assert_eq!(split((0..100).collect(), &all, 1).1.len(), 5, "unless there are none");
    assert_eq!(split(vec![3, 150], &all, 1), (vec![3, 150], vec![150]));
}

#[test]
fn the_rate_rises_and_falls() {
    let rates: Vec<f32> = (0..100).map(|step| rate(step, 100)).collect();
    assert_eq!((rates[0], rates[9], rates[10]), (0.1, 1.0, 1.0));
    assert!(rates[10..].windows(2).all(|w| w[1] < w[0]));
    assert!(rates[99] > 0.0 && rates[99] < 0.02);
    assert_eq!(rate(0, 1), 1.0);
}
