use super::*;

fn sequences(lengths: &[usize]) -> Vec<Sequence> {
    lengths.iter().map(|&length| Sequence::with_length(length)).collect()
}

#[test]
fn every_sequence_is_seen_as_often_and_steps_have_like_lengths() {
    let lengths: Vec<usize> = (0..40).map(|at| 2 + at * 7 % 31).collect();
    let all = sequences(&lengths);
    let training: Vec<usize> = (0..40).collect();
    let options = FullOptions { steps: 20, batch: Some(4), seed: 5, ..FullOptions::default() };
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
    assert_ne!(plan(&training, &all, &FullOptions { seed: 6, ..options }), made);
}

#[test]
fn a_step_takes_fewer_long_texts() {
    let largest = |length: usize, batch: Option<usize>| {
        let all = sequences(&vec![length; 64]);
        let steps =
            plan(&(0..64).collect::<Vec<_>>(), &all, &FullOptions { steps: 9, batch, ..FullOptions::default() });
        steps.iter().map(Vec::len).max().unwrap()
    };
    assert_eq!(largest(20, None), DEFAULT_POSITIONS / 20);
    assert_eq!(largest(60, None), DEFAULT_POSITIONS / 60);
    assert_eq!(largest(1000, None), 1);
    assert_eq!(largest(1000, Some(20)), 20);
}

#[test]
fn the_rate_rises_and_falls() {
    let rates: Vec<f32> = (0..100).map(|step| rate(step, 100)).collect();
    assert_eq!((rates[0], rates[9], rates[10]), (0.1, 1.0, 1.0));
    assert!(rates[10..].windows(2).all(|w| w[1] < w[0]));
    assert!(rates[99] > 0.0 && rates[99] < 0.02);
    assert_eq!(rate(0, 1), 1.0);
}
