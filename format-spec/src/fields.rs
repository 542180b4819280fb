//! Declaring an on-disk structure once: name, type and byte offset of each field.
//!
//! From one `structure!` come the Rust struct, reading and writing of its fixed part, a module
//! of offset constants with a table of all fields (which a test compares with `SPEC.md`), and
//! compile-time assertions that the fields leave no gap, do not overlap and have the stated size.

use crate::error::DecodeError;

/// One line of a structure's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FieldInfo {
    /// Name, or `reserved` for bytes that are zero.
    pub name: &'static str,
    /// First byte within the structure.
    pub offset: usize,
    /// Length in bytes.
    pub size: usize,
}

/// What is wrong, and how far into the field.
pub(crate) type FieldError = (usize, &'static str);

/// A type of field: how a host value lies in its bytes.
pub(crate) trait Field {
    /// The value in memory.
    type Host;
    /// Bytes on disk.
    const SIZE: usize;
    /// Reads the value from at least `SIZE` bytes.
    fn get(bytes: &[u8]) -> Result<Self::Host, FieldError>;
    /// Writes the value to exactly `SIZE` bytes.
    fn put(value: &Self::Host, bytes: &mut [u8]);
}

const SHORT: FieldError = (0, "truncated");

macro_rules! integer_field {
    ($($Name:ident $host:ty, $size:literal;)*) => {$(
        pub(crate) enum $Name {}
        impl Field for $Name {
            type Host = $host;
            const SIZE: usize = $size;
            fn get(bytes: &[u8]) -> Result<$host, FieldError> {
                let low: [u8; $size] = *bytes.first_chunk().ok_or(SHORT)?;
                let mut whole = [0; size_of::<$host>()];
                whole[..$size].copy_from_slice(&low);
                Ok(<$host>::from_le_bytes(whole))
            }
            fn put(value: &$host, bytes: &mut [u8]) {
                let whole = value.to_le_bytes();
                assert!(whole[$size..].iter().all(|&byte| byte == 0), "value too large for its field");
                bytes.copy_from_slice(&whole[..$size]);
            }
        }
    )*};
}

integer_field! {
    U8 u8, 1;
    U16 u16, 2;
    U32 u32, 4;
    U48 u64, 6;
    U64 u64, 8;
}

/// Sixteen opaque bytes: a UUID, a boot id, an identity.
pub(crate) enum Id16 {}

impl Field for Id16 {
    type Host = [u8; 16];
    const SIZE: usize = 16;
    fn get(bytes: &[u8]) -> Result<[u8; 16], FieldError> {
        bytes.first_chunk().copied().ok_or(SHORT)
    }
    fn put(value: &[u8; 16], bytes: &mut [u8]) {
        bytes.copy_from_slice(value);
    }
}

/// A u16 length, so many bytes of UTF-8, zeroes up to `N` bytes in all.
pub(crate) enum Text<const N: usize> {}

impl<const N: usize> Field for Text<N> {
    type Host = String;
    const SIZE: usize = N;
    fn get(bytes: &[u8]) -> Result<String, FieldError> {
        let bytes = bytes.get(..N).ok_or(SHORT)?;
        let (length, rest) = bytes.split_at_checked(2).ok_or(SHORT)?;
        let length = usize::from(U16::get(length)?);
        let (text, padding) =
            rest.split_at_checked(length).ok_or((0, "text longer than its field"))?;
        if padding.iter().any(|&byte| byte != 0) {
            return Err((2 + length, "text is not followed by zeroes"));
        }
        if text.contains(&0) {
            return Err((2, "text contains a zero byte"));
        }
        let text = std::str::from_utf8(text).map_err(|_| (2, "text is not UTF-8"))?;
        Ok(text.to_owned())
    }
    fn put(value: &String, bytes: &mut [u8]) {
        let length = u16::try_from(value.len()).expect("text fits its field");
        let (head, rest) = bytes.split_at_mut(2);
        head.copy_from_slice(&length.to_le_bytes());
        rest.fill(0);
        rest[..value.len()].copy_from_slice(value.as_bytes());
    }
}

/// Refuses reserved bytes that are not zero.
pub(crate) fn check_zero(bytes: &[u8], offset: usize, size: usize) -> Result<(), FieldError> {
    let bytes = bytes.get(offset..).and_then(|rest| rest.get(..size)).ok_or(SHORT)?;
    match bytes.iter().position(|&byte| byte != 0) {
        None => Ok(()),
        Some(at) => Err((offset + at, "reserved byte is not zero")),
    }
}

/// Reads the field of type `F` at `offset`.
pub(crate) fn get_at<F: Field>(bytes: &[u8], offset: usize) -> Result<F::Host, FieldError> {
    let bytes =
        bytes.get(offset..).and_then(|rest| rest.get(..F::SIZE)).ok_or((offset, SHORT.1))?;
    F::get(bytes).map_err(|(at, what)| (offset + at, what))
}

/// Writes the field of type `F` at `offset`, which lies inside `bytes`.
pub(crate) fn put_at<F: Field>(value: &F::Host, bytes: &mut [u8], offset: usize) {
    F::put(value, &mut bytes[offset..offset + F::SIZE]);
}

/// Names the structure in a field's error.
pub(crate) fn located(structure: &'static str) -> impl Fn(FieldError) -> DecodeError {
    move |(offset, what)| DecodeError::corrupt(structure, offset, what)
}

/// Declares a structure. Each line is `name: host type as Type = offset` (a public field), `[n] = offset`
/// (n reserved bytes) or `(name: Type) = offset` (a field the structure's own code fills in).
/// `also { .. }` adds members that are not in the fixed part.
macro_rules! structure {
    (
        $(#[$sm:meta])*
        pub struct $Name:ident, $layout:ident, $size:expr; {
            $(
                $( $(#[$m:meta])* $name:ident : $host:ty as $ty:ident )?
                $( [ $pad:literal ] )?
                $( ( $dname:ident : $dty:ident ) )?
                = $offset:literal
            ),* $(,)?
        }
        $( also { $( $(#[$xm:meta])* $xname:ident : $xty:ty ),* $(,)? } )?
    ) => {
        $(#[$sm])*
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct $Name {
            $( $( $(#[$m])* pub $name: $host, )? )*
            $( $( $(#[$xm])* pub $xname: $xty, )* )?
        }

        #[doc = concat!("Byte offsets of the fields of `", stringify!($Name), "`.")]
        #[allow(non_upper_case_globals, missing_docs, dead_code, unused_imports)]
        pub mod $layout {
            use super::*;
            use $crate::fields::{Field, FieldInfo};
            $( $( pub const $name: usize = $offset; )? $( pub const $dname: usize = $offset; )? )*
            /// Bytes of the fixed part.
            pub const SIZE: usize = $size;
            /// Every field, in order.
            pub const FIELDS: &[FieldInfo] = &[ $(
                $( FieldInfo { name: stringify!($name), offset: $offset, size: <$ty as Field>::SIZE }, )?
                $( FieldInfo { name: "reserved", offset: $offset, size: $pad }, )?
                $( FieldInfo { name: stringify!($dname), offset: $offset, size: <$dty as Field>::SIZE }, )?
            )* ];
            const _: () = {
                let mut at = 0;
                $(
                    assert!(at == $offset, "fields leave a gap or overlap");
                    $( at += <$ty as Field>::SIZE; )?
                    $( at += $pad; )?
                    $( at += <$dty as Field>::SIZE; )?
                )*
                assert!(at == SIZE, "fields do not fill the structure");
            };
        }

        #[allow(dead_code)]
        impl $Name {
            /// Reads the fixed part. Reserved bytes are the business of `check_reserved`.
            pub(crate) fn get_fields(bytes: &[u8]) -> Result<Self, $crate::fields::FieldError> {
                Ok($Name {
                    $( $( $name: $crate::fields::get_at::<$ty>(bytes, $offset)?, )? )*
                    $( $( $xname: <$xty>::default(), )* )?
                })
            }

            /// Refuses reserved bytes that are not zero.
            pub(crate) fn check_reserved(bytes: &[u8]) -> Result<(), $crate::fields::FieldError> {
                $( $( $crate::fields::check_zero(bytes, $offset, $pad)?; )? )*
                let _ = bytes;
                Ok(())
            }

            /// Writes the fixed part; reserved and derived fields are left alone.
            pub(crate) fn put_fields(&self, bytes: &mut [u8]) {
                $( $( $crate::fields::put_at::<$ty>(&self.$name, bytes, $offset); )? )*
            }
        }
    };
}

/// Lets a small structure be a field of a larger one.
macro_rules! nested {
    ($Name:ident, $layout:ident) => {
        impl $crate::fields::Field for $Name {
            type Host = $Name;
            const SIZE: usize = $layout::SIZE;
            fn get(bytes: &[u8]) -> Result<$Name, $crate::fields::FieldError> {
                $Name::check_reserved(bytes)?;
                $Name::get_fields(bytes)
            }
            fn put(value: &$Name, bytes: &mut [u8]) {
                value.put_fields(bytes);
            }
        }
    };
}

/// Declares an enumeration that lies in an integer field.
macro_rules! enumeration {
    (
        $(#[$em:meta])*
        pub enum $Name:ident: $raw:ident, $what:literal {
            $( $(#[$m:meta])* $Variant:ident = $value:literal ),* $(,)?
        }
    ) => {
        $(#[$em])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $Name { $( $(#[$m])* $Variant = $value ),* }

        impl $Name {
            /// Every value, in numeric order.
            pub const ALL: &[$Name] = &[ $( $Name::$Variant ),* ];
        }

        impl $crate::fields::Field for $Name {
            type Host = $Name;
            const SIZE: usize = <$raw as $crate::fields::Field>::SIZE;
            fn get(bytes: &[u8]) -> Result<$Name, $crate::fields::FieldError> {
                match <$raw as $crate::fields::Field>::get(bytes)? {
                    $( $value => Ok($Name::$Variant), )*
                    _ => Err((0, concat!("unknown ", $what))),
                }
            }
            fn put(value: &$Name, bytes: &mut [u8]) {
                <$raw as $crate::fields::Field>::put(&(*value as _), bytes);
            }
        }
    };
}
