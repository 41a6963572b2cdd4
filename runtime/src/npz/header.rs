//! The header of one array in numpy's format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use std::io::Read;

use mabert_graph::ElementType;

const MAGIC: &[u8] = b"\x93NUMPY";
/// Headers are a hundred bytes; one of a structured type may be longer.
const LONGEST: usize = 1 << 16;

/// What is said of an array before its elements.
#[derive(Debug, PartialEq)]
pub(super) struct Header {
    pub(super) element: ElementType,
    pub(super) big_endian: bool,
    /// Whether columns come first.
    pub(super) fortran: bool,
    pub(super) shape: Vec<usize>,
}

impl Header {
    /// Reads it from the start of an array's file; `reader` is then at the elements.
    ///
    /// # Errors
    /// What it is instead.
    pub(super) fn read(reader: &mut impl Read) -> Result<Self, String> {
        let mut start = [0; 8];
        let mut fill = |bytes: &mut [u8]| reader.read_exact(bytes).map_err(|e| format!("its header ends early: {e}"));
        fill(&mut start)?;
        if start[..6] != *MAGIC {
            return Err("not an array of numpy's".to_owned());
        }
        let mut length = [0; 4];
        // The second version of the format has longer headers.
        fill(&mut length[..if start[6] > 1 { 4 } else { 2 }])?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(format!("a header of {length} bytes is longer than any"));
        }
        let mut text = vec![0; length];
        fill(&mut text)?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    /// A dictionary as Python writes it: `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`.
    fn parse(text: &str) -> Result<Self, String> {
        let after = |key: &str| {
            let (_, value) =
                text.split_once(&format!("'{key}':")).ok_or_else(|| format!("its header lacks `{key}`"))?;
            Ok::<_, String>(value.trim_start())
        };
        let kind = after("descr")?.strip_prefix('\'').and_then(|rest| rest.split('\'').next());
        let kind = kind.ok_or("of a type with fields, which are not read")?;
        let (order, code) = kind.split_at_checked(1).unwrap_or_default();
        let element = element(code).ok_or_else(|| {
            let read = CODES.map(|(element, _)| element.name()).join(", ");
            format!("of type `{kind}`; {read} are read")
        })?;
        let shape = after("shape")?.strip_prefix('(').and_then(|rest| rest.split(')').next());
        let sizes = shape.unwrap_or("?").split(',').map(|size| size.trim().trim_end_matches('L'));
        let shape: Option<Vec<usize>> = sizes.filter(|size| !size.is_empty()).map(|size| size.parse().ok()).collect();
        let shape = shape.ok_or("of a shape that is none")?;
        Ok(Self { element, big_endian: order == ">", fortran: after("fortran_order")?.starts_with("True"), shape })
    }

    /// The bytes of the elements, where a machine can count them.
    pub(super) fn size(&self) -> Option<usize> {
        let product = self.shape.iter().try_fold(self.element.size(), |bytes, &size| bytes.checked_mul(size));
        product.filter(|&bytes| isize::try_from(bytes).is_ok())
    }

    /// The bytes of the header.
    pub(super) fn write(&self) -> Vec<u8> {
        let code = CODES.iter().find(|(element, _)| *element == self.element).map_or("", |(_, code)| code);
        let order = if self.element.size() == 1 { '|' } else { '<' };
        let sizes: String = self.shape.iter().map(|size| format!("{size}, ")).collect();
        let mut text = format!("{{'descr': '{order}{code}', 'fortran_order': False, 'shape': ({sizes}), }}");
        // Elements start at a multiple of 64 bytes.
        let start = MAGIC.len() + 4;
        let padded = (start + text.len() + 1).next_multiple_of(64) - start;
        text.extend(std::iter::repeat_n(' ', padded - 1 - text.len()));
        text.push('\n');
        let length = u16::try_from(text.len()).expect("a few axes").to_le_bytes();
        [MAGIC, &[1, 0], &length, text.as_bytes()].concat()
    }
}

/// numpy's codes of the element types, without their order of bytes.
const CODES: [(ElementType, &str); 8] = [
    (ElementType::F32, "f4"),
    (ElementType::F64, "f8"),
    (ElementType::F16, "f2"),
    (ElementType::I64, "i8"),
    (ElementType::I32, "i4"),
    (ElementType::I8, "i1"),
    (ElementType::U8, "u1"),
    (ElementType::Bool, "b1"),
];

fn element(code: &str) -> Option<ElementType> {
    CODES.iter().find(|(_, known)| *known == code).map(|(element, _)| *element)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_numpy_writes_them() {
        let header =
            |element, shape: &[usize]| Header { element, big_endian: false, fortran: false, shape: shape.to_vec() };
        for shape in [&[][..], &[3], &[2, 0, 5], &[1; 16]] {
            for (element, _) in CODES {
                let bytes = header(element, shape).write();
                assert_eq!(bytes.len() % 64, 0);
                assert_eq!(Header::read(&mut bytes.as_slice()), Ok(header(element, shape)));
            }
        }
        let parsed = Header::parse("{'shape': (2L, 3L), 'descr': '>i8', 'fortran_order': True}").unwrap();
        assert_eq!(parsed, Header { element: ElementType::I64, big_endian: true, fortran: true, shape: vec![2, 3] });
    }

    #[test]
    fn other_headers_are_refused_by_what_they_are() {
        for (text, part) in [
            ("{'descr': '<U7', 'fortran_order': False, 'shape': (3,), }", "of type `<U7`"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "of type `|O`"),
            ("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (3,), }", "with fields"),
            ("{'descr': '<i8', 'fortran_order': False, 'shape': (-3,), }", "of a shape that is none"),
            ("{'descr': '<i8', 'fortran_order': False}", "lacks `shape`"),
            ("{'descr': ''}", "of type ``"),
        ] {
            let error = Header::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(Header::read(&mut &b"PK"[..]).unwrap_err().contains("ends early"));
        assert!(
            Header::read(&mut &[b"\x93NUMPY\x02\0".as_slice(), &[255; 4]].concat()[..]).unwrap_err().contains("longer")
        );
        let large =
            Header { element: ElementType::F64, big_endian: false, fortran: false, shape: vec![1 << 31, 1 << 31] };
        assert_eq!(large.size(), None);
    }
}
