//! Names out of files, as they may be printed: a file must not move a terminal's cursor, nor the words around a name.

use std::borrow::Cow;

/// Whether a character is neither a control code, nor one that changes the direction of text, ends lines, or has no width
/// and no use in words.
pub fn is_printable(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// A text on one line, what is not [printable](is_printable) spelled as in Rust: `\n`, `\u{1b}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return text.into();
    }
    let mut spelled = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_printable(c) {
            spelled.push(c);
        } else {
            spelled.extend(c.escape_default());
        }
    }
    spelled.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_a_cursor_or_turns_text_is_spelled() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\t\u{7f}\u{9b}31m"), "a\\u{1b}[2Jb\\r\\n\\t\\u{7f}\\u{9b}31m");
        assert_eq!(
            printable("logits\u{202e}stigol\u{2066}\u{feff}\u{2028}"),
            "logits\\u{202e}stigol\\u{2066}\\u{feff}\\u{2028}"
        );
        for text in ["/bert/Add_2", "名前 é ü", "می\u{200c}خواهم", "👩\u{200d}🔬", "back\\slash \"quoted\""]
        {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
        }
    }
}
